"""Functions that another process imports."""

import os
import time


def double(x):
    return 2 * x


def misbehave(how):
    if how == "hang":
        time.sleep(60)
    elif how == "hang in C":
        return len(str(7 ** (10**8)))
    elif how == "raise":
        raise ValueError("no")
    elif how == "die":
        os._exit(1)
    elif how == "memory":
        return len("x" * 10**11)
    elif how == "print":
        print("[42, null]")
    elif how == "flood":
        return "x" * 10**7
    elif how == "not JSON":
        return object()
    return "done"
