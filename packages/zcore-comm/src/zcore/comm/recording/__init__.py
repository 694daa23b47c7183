"""What collectives took, seen from outside: every group that serves is wrapped once, and costs nothing unrecorded.

recorded       a group whose calls are told to whoever listens
recorder       listens, and asks the other ranks
totals         records of calls, and their sums           pure
comm_report    the sums of all ranks as a report          pure
tables         tables in text and in colour
chrome_trace   the records as a trace of Chrome           pure
"""
