"""The entries of the catalog, one file for each family; read without importing torch."""
