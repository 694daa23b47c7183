"""`zcore comm bench` and `zcore comm tune`: what collectives take on these machines, beside torch's own.

command      the options; starts ranks
measure      one rank of a bench -> a Report
contenders   whom it measures; among them the `wire`: what messages between two ranks allow
table, plot  a Report as text and as a picture
tune         the fastest algorithm of messages between pairs -> the table that `pairs.algorithms` reads
"""
