"""What training passes put in the place of dialect nodes: functions with a forward and a backward of their own.

Each is a callable that AOTAutograd traces through, so the partitioner and the inner compiler see its products; what is
saved and in which order the backward multiplies is decided here, and checked against the dialect's plain definitions.
"""
