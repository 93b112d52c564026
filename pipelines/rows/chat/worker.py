"""The program that renders chat templates, run by its path in a separate process without other modules of this package.

A template is a program written by the author of the model. The sandbox keeps it from files and objects, but not from
infinite loops or from `'a' * 10**10`. The operating system limits these here: processor time per rendering, and memory
of the process. Requests and answers are JSON, each after its length (8 bytes). An answer is [kind, text]; to a list of
requests, it is a list.
"""

import json
import os
import random
import resource
import signal
import struct
import sys


def main(memory: int) -> None:
    """Answer requests until there are no more. A rendering that exceeds its time ends the process by SIGPROF.

    Args:
        memory: The bytes that the process may use beyond its present size.
    """
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # printed text must not mix with the answers
    requests = sys.stdin.buffer
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        pages = int((file.read().split() or ["0"])[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = pages * resource.getpagesize() + memory
    if pages and (hard == resource.RLIM_INFINITY or most < hard):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    drawn = random.Random(0).getstate()
    while header := requests.read(8):
        asked = json.loads(requests.read(*struct.unpack("<q", header)))
        several = isinstance(asked[0], list)
        found = []
        for seconds, longest, arguments in asked if several else [asked]:
            random.setstate(drawn)  # a template that draws random numbers draws the same ones for a row every time
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                text = render_jinja_template(**arguments)[0][0]
                text.encode("utf-8")
                answer = ["long", ""] if len(text) > longest else ["text", text]
            except jinja2.TemplateSyntaxError as error:
                answer = ["invalid", str(error)]
            except MemoryError:
                answer = ["large", ""]
            except Exception as error:  # any error of a template
                answer = ["refused", (str(error).strip() or type(error).__name__).splitlines()[0][:1000]]
            text = ""
            found.append(json.dumps(answer).encode("ascii"))
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer.clear()
        written = b"[" + b",".join(found) + b"]" if several else found[0]
        answers.write(struct.pack("<q", len(written)) + written)
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
