"""The process in which generated code runs: limits and a filter of system calls first, then the program.

Run as a script by `sandbox.outcome`, with the standard library alone. Arguments: the program, seconds, megabytes. The
word that it prints at the end comes on stdin.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import runpy
import struct
import sys

NO_FILTER = 97
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # EPERM
_LOAD, _EQUAL, _BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# numbers of system calls: (x86-64, ARM 64); None where the machine has none of the name
_REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "creat": (85, None), "openat2": (437, 437), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "truncate": (76, 45), "ftruncate": (77, 46), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "prlimit64": (302, 261), "setrlimit": (160, 164), "reboot": (169, 142), "init_module": (175, 105),
    "finit_module": (313, 273), "swapon": (167, 224), "ioctl": (16, 29), "shmget": (29, 194), "msgget": (68, 186),
    "mq_open": (240, 180), "open_by_handle_at": (304, 265), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
}  # fmt: skip
_OPEN = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""Calls that open files -> their numbers, and which argument holds the flags."""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def program_of(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as instructions (code, jump if true, jump if false, constant) of the kernel's packet filter.

    Args:
        machine: "x86_64" or "aarch64".
    """
    place, architecture = _MACHINES[machine]
    refuse = (_RETURN, 0, 0, _DENY)
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the other numbering of the same calls
        steps += [(_BITS, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in _REFUSED.values():
        if (number := numbers[place]) is not None:
            steps += [(_EQUAL, 0, 1, number), refuse]
    for numbers, argument in _OPEN.values():
        if (number := numbers[place]) is not None:
            flags = 16 + 8 * argument  # the low half of the argument, little-endian
            steps += [(_EQUAL, 0, 3, number), (_LOAD, 0, 0, flags), (_BITS, 0, 1, _WRITES), refuse, (_LOAD, 0, 0, 0)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def isolate() -> bool:
    """Take the refused calls away from this process for good; False where the kernel cannot."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if sys.platform != "linux" or machine not in _MACHINES or struct.calcsize("P") != 8:
        return False
    code = b"".join(struct.pack("=HBBI", *step) for step in program_of(machine))
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    prctl = libc.prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    pointer = ctypes.create_string_buffer(header)
    no_new_privileges = prctl(38, 1, 0, 0, 0) == 0
    return no_new_privileges and bool(prctl(22, 2, ctypes.addressof(pointer), 0, 0) == 0)


def limit(seconds: float, megabytes: int) -> None:
    """Limit memory, time, files and processes.

    Args:
        seconds: Seconds of CPU time.
        megabytes: The size of the address space in MiB.
    """
    most = int(seconds) + 1
    for what, value in (
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_CPU, most),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def main() -> int:
    """Run the program of the arguments."""
    program, seconds, megabytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    word = sys.stdin.buffer.read()
    out = os.dup(1)
    os.dup2(2, 1)  # stderr goes nowhere, and what the program prints goes with it
    limit(seconds, megabytes)
    if not isolate():
        return NO_FILTER
    sys.argv = [program]
    runpy.run_path(program, run_name="generated")
    os.write(out, word)
    return 0


if __name__ == "__main__":
    os._exit(main())
