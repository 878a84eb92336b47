"""stub: being written"""
NAME = "attention"
HOST = None


def slots(module):
    return None
