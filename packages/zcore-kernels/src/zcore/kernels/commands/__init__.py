"""`zcore kernels list`, `check` and `bench`: what serves each op here, whether it is right, and how fast it is.

command      the options
cases        operands to try every op with: a row for each op
listing      what the registry holds -> tables
checking     each implementation beside its reference
measuring    each beside torch and beside what memory allows
"""
