"""stub: being written"""
NAME = "experts"
HOST = None


def slots(module):
    return None
