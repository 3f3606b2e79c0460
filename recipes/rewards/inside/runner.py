"""Within the sandbox, before a program: limits that cannot be raised again, then a process for it.

    python -c TEXT_OF_THIS_FILE SETTINGS FILE_DESCRIPTOR

This process alone knows the words that say how the program ended, lets nobody look into it, and gives a text of Python when the
one before it has run. The last one ends with a word of its own, so that it is not enough to leave with 0.

Standard library only, and nothing that a program could change is asked afterwards.
"""

__all__ = ["run"]


def run(exec=exec, compile=compile):
    import ctypes
    import json
    import os
    import resource
    import select
    import sys

    question, settings = int(sys.argv.pop()), json.loads(sys.argv.pop())
    if settings["user"] is not None:
        os.setgroups([])
        os.setgid(settings["user"])
        os.setuid(settings["user"])
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    filter = bytes.fromhex(settings["filter"])

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
    if prctl(38, one, zero, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if prctl(22, ctypes.c_ulong(2), ctypes.byref(Filter(len(filter) // 8, filter)), zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
    if prctl(4, zero, zero, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE")
    texts, give = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for each in (question, give, told):
            os.close(each)
        os.setsid()
        prctl(4, one, zero, zero, zero)
        texts = os.fdopen(texts, encoding="utf-8")
        program = {"__name__": settings["name"]}
        for _ in range(settings["parts"]):
            os.write(tell, b"+")
            exec(compile(json.loads(texts.readline()), "program.py", "exec", dont_inherit=True), program)
        return
    os.close(texts)
    os.close(tell)
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    end = os.urandom(16).hex().encode()
    parts = asked["parts"]
    parts[-1] += f"\n__import__('os').write({tell}, {end})\n"
    print(asked["begun"], end="", file=sys.stderr, flush=True)
    give, gone, said = os.fdopen(give, "w", encoding="utf-8"), os.pidfd_open(child), b""
    watched = [told, gone]
    while told in (ready := select.select(watched, [], [])[0]) or gone not in ready:
        chunk = os.read(told, 64)
        said = (said + chunk)[-len(end) :]
        if not chunk:
            watched.remove(told)
        elif parts:
            try:
                print(json.dumps(parts.pop(0)), file=give, flush=True)
            except OSError:  # it has ended
                parts.clear()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0 and said == end:
        print(asked["ended"], end="", file=sys.stderr, flush=True)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run()
