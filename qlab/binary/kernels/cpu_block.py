"""The argument block of the product kernel `cpu_gemm.gemm`: the number of each of its int64 words.

A module, not an enum: Numba reads a module's integers as constants.
"""

# fmt: off
(
    X,                 # address of the rows' words
    ROWS, ROWS_EACH,   # rows in all; rows of one image, which the tables describe
    IMAGE_STRIDE,      # bytes from one image to the next
    PLACES,            # table: bytes from an image to where row m starts
    TAPS, WORDS,       # table: bytes from a row's start to its word k; number of words
    PLANES, PLANE_STRIDE,  # bit planes; bytes from one to the next
    CLASSES,           # table: bytes from BIAS to the line of row m's class
    PANEL, PANELS,     # weights; number of panels
    PANELS_PER_GROUP, GROUP_CHANNELS, GROUP_STRIDE,  # of a group: panels, output channels, bytes of its words in a pixel
    BIAS,              # table (class, panel, column): bias, or limit where signs come out
    SHIFT, COMPLEMENT,
    ROW_RUN, PANEL_RUN,  # a chunk of work: so many rows of an image by so many panels
    KIND,              # INTEGERS, SIGNS or FLOATS
    OUT, OUT_STRIDE,   # address; bytes from row to row
    FLIP,              # SIGNS: words that are xored with the bits
    ALPHA, BETA, FUSED, RESIDUAL,  # FLOATS: addresses; whether rounded once; address or 0
    SIGN_BITS, SIGN_STRIDE,  # FLOATS: address of the words of the result's signs, or 0; bytes from row to row
    LENGTH,
) = range(31)
# fmt: on

INTEGERS, SIGNS, FLOATS = range(3)

# At the end of any block: how many chunks of work there are, and what every thread counts: threads, chunks taken, chunks taken
# from the front and from the back. All threads write the counters, so they have a cache line of their own.
CHUNKS, COUNTERS, SIZE = 31, 40, 44

COLUMNS = 16  # output channels side by side in a panel
