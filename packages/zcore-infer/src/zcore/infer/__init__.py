"""A ragged-batch inference engine and its server.

Declared place: floor 4, the top; imports zcore.core only. Nothing is offered here yet.
"""
