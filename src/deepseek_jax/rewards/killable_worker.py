"""The other process of ``killable``: answers lines until there are no more.

Run as a script, so that it imports nothing that the function does not ask for; with ``-P``, since
the modules of this folder are not to be found without their package.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """The first line names the function; each further one is a call of it."""
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What the function prints must not be taken for an answer.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    function: Callable[..., Any] | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if function is None:
                function, value = getattr(importlib.import_module(message[0]), message[1]), None
            else:
                value = function(*message)
            answer = json.dumps([value, None])
        except Exception as error:
            answer = json.dumps([None, f"{type(error).__name__}: {error}"[:1000]])
        replies.write(answer + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
