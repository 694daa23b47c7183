"""Which ranks there are, whether they still live, and what each of them called last.

home      where a rank lives: host and process
meeting   the ranks of a group tell each other their homes and agree on how they are served, at its first use
cards     what every process leaves in the rendezvous store for the others
journal   a group's calls, and why one of them does not complete
patience  when a wait looks after the others, is told, is over
words     what a user reads of all that
"""
