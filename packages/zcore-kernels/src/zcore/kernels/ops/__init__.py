"""The ops, one a file. Each file registers its op when imported, with torch and with the registry of the core."""
