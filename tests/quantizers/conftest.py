"""The plain nets that quantizers are put on."""

import pytest

from tests.quantizers.nets import NETS, make


@pytest.fixture(params=NETS)
def plain(request):
    return make(request.param)
