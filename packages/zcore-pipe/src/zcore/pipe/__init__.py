"""Pipeline parallelism: schedules as data, and a short executor that performs them.

Declared place: floor 3, beside zcore.zero; imports zcore.core only. Nothing is offered here yet.
"""
