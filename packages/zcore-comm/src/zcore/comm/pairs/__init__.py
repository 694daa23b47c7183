"""Ranks that gloo connects, through messages between pairs of them.

moves        how data go between ranks; a finish for each
algorithms   which of these moves, by op, ranks and bytes
worker       the thread that brings calls to their end
pairwise     the collectives
"""
