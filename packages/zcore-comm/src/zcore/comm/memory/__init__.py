"""Ranks of one host, through pages that they share.

pages           a rank's own pages, given out and taken back
board           what neighbours tell each other about calls, in one page each
neighbours      their boards and pages, opened here; waiting for them
under_way       what becomes of a call, from its start to its end
shared_memory   the collectives
"""
