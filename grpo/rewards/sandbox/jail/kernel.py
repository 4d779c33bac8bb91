"""The Linux features that isolate a process, one function each: namespaces, a separate root, limits, privileges,
Landlock, seccomp. They use only ctypes and the standard library. Each raises an OSError if the kernel refuses.

Sources: the manual pages unshare(2), pivot_root(2), mount_setattr(2), setrlimit(2), landlock(7), seccomp(2). The order
of the steps follows bubblewrap.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

# Namespaces of unshare(2)
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# Flags of mount(2)
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2  # of umount2(2)
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
# Operations of prctl(2)
PDEATHSIG, DUMPABLE, SECCOMP, CHILD_SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38

_MACHINES = ("x86_64", "aarch64")  # the columns of the tables below
_MACHINE = _MACHINES.index(platform.machine()) if platform.machine() in _MACHINES else None
_PIVOT_ROOT = (155, 41)
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on all machines


def _call(function: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library. Raises an OSError if it returns a negative number."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = getattr(_libc, function)(*values)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def prctl(operation: int, value: int) -> None:
    """prctl(2) with one argument."""
    _call("prctl", operation, value, 0, 0, 0)


# Namespaces and a separate root


def enter_namespaces() -> bool:
    """Create mount, network, IPC and host-name namespaces for this process, and a process namespace for its children.

    A user other than root needs a new user namespace for this, in which only this user exists, with the same number.
    Returns whether a user namespace was created; root usually needs none.
    """
    uid, gid, flags = os.geteuid(), os.getegid(), NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if uid == 0:
        try:
            _call("unshare", flags)
            return False
        except PermissionError:  # root inside a container may not do this without a user namespace
            pass
    _call("unshare", flags | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def build_root(shown: Sequence[str], writable_bytes: int) -> None:
    """Create a root that has only the read-only folders `shown`, three devices and an empty /tmp. Change to its /tmp.

    `shown`: absolute paths without symbolic links. The links that programs use (/lib -> usr/lib) are created.
    """
    if _MACHINE is None:
        raise OSError(f"pivot_root: its number is not known on {platform.machine()}")
    links = {name: os.readlink(name) for name in ("/lib", "/lib64") if os.path.islink(name)}
    _mount("none", "/", flags=_REC | _PRIVATE)  # later mounts are not visible outside
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")  # becomes the new root; any folder works
    os.mkdir("/tmp/old")
    _call("syscall", _PIVOT_ROOT[_MACHINE], b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    own = f"size={writable_bytes},nr_inodes=1000,mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, own)
    for path in shown:
        os.makedirs(path, exist_ok=True)
        _mount(f"/old{path}", path, flags=_BIND | _REC)
        attributes = struct.pack("QQQQ", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)  # to set, to clear, propagation, user ns
        _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, attributes, len(attributes))
    for name, target in links.items():
        if not os.path.lexists(name):
            os.symlink(target, name)
    os.mkdir("/dev")
    for name in ("null", "zero", "urandom"):
        os.close(os.open(f"/dev/{name}", os.O_CREAT))
        _mount(f"/old/dev/{name}", f"/dev/{name}", flags=_BIND)
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir("/tmp")


# Limits and privileges


def set_limits(*, seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Limit CPU time, address space, the size of each file, processes, open files and core dumps."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def drop_privileges(uid: int | None) -> None:
    """Change to the user `uid` unless it is None, drop all capabilities, and prevent gaining new privileges."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))  # version 3 of capset(2)
    _call("capset", ctypes.addressof(header), bytes(24))  # three sets of 64 bits
    prctl(NO_NEW_PRIVS, 1)


# Landlock: which files a process may open. Used if a separate root is not possible.


def landlock_version() -> int:
    """The version of Landlock in this kernel; 0 if it has none."""
    try:
        return _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict_files(readable: Sequence[str], writable: str) -> None:
    """Restrict this process: it may read only below `readable`, and write only below `writable` and to /dev/null."""
    known = (1 << {1: 13, 2: 14}.get(landlock_version(), 15)) - 1  # every right that this version knows
    attributes = struct.pack("Q", known)
    ruleset = _call("syscall", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    read = 0b1100  # files and folders
    special = 0b1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # execute; make devices of characters or blocks, sockets, pipes
    read_write_truncate = 0b110 | 1 << 14
    rules = dict.fromkeys(readable, read) | {writable: known & ~special, "/dev/null": read_write_truncate & known}
    for path, rights in rules.items():
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("syscall", _LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, folder), 0)
        os.close(folder)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


# seccomp: which system calls fail

DENIED = {  # name -> number on x86_64, on aarch64
    # starting, affecting or leaving other processes
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154), "setpriority": (141, 140), "prlimit64": (302, 261),
    "setrlimit": (160, 164), "prctl": (157, 167), "sched_setaffinity": (203, 122),
    # changing a file's owner, permissions, times or length, which Landlock does not fully control
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "truncate": (76, 45), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
    # memory held as a file or in a pipe; System V objects, message queues and file watches
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75), "splice": (275, 76),
    "tee": (276, 77), "shmat": (30, 196), "shmctl": (31, 195), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_unlink": (241, 181),
    "io_setup": (206, 0), "inotify_init": (253, None), "inotify_init1": (294, 26),
    # the scheduling and memory of other processes
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    # network, and objects that outlive the process
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # new namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    # parts of the kernel that a program does not need
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "syslog": (103, 116), "fanotify_init": (300, 262), "personality": (135, 92),
    "seccomp": (317, 277),
}  # fmt: skip
_REACHING = {  # calls that affect other processes only with certain arguments: file signals, leases, datagram sockets
    "fcntl": ((72, 25), (8, 10, 15, 1024, 1026)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
    "socketpair": ((53, 199), (2, 0x802, 0x80002, 0x80802)),  # SOCK_DGRAM, which may send to any address
    "ioctl": ((16, 29), (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
}
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of classic BPF
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000


def deny_system_calls() -> None:
    """Make the calls of DENIED fail with EPERM. A call with the numbering of another machine kills the process."""
    if _MACHINE is None:
        raise OSError(f"seccomp: no table of system calls for {platform.machine()}")
    numbers = [number for row in DENIED.values() if (number := row[_MACHINE]) is not None]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH[_MACHINE]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]  # x32's numbers on x86_64
    for places, arguments in _REACHING.values():  # numbers of the call, denied values of its second argument
        program.append((_EQUAL, 0, 1 + 2 * len(arguments) + 1, places[_MACHINE]))
        program.append((_LOAD, 0, 0, 24))  # the lower half of the second argument
        for argument in arguments:
            program += [(_EQUAL, 0, 1, argument), (_RETURN, 0, 0, _EPERM)]
        program.append((_RETURN, 0, 0, _ALLOW))
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        program.append((_EQUAL, left, 0, number))  # if equal, jump to the last instruction
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
    _call("prctl", SECCOMP, 2, filter_, 0, 0)  # 2 = filter mode, which needs NO_NEW_PRIVS
