"""Builds the jail and becomes the harness in it: ``python -I -S jail.py EMPTY_FOLDER PLACE`` (imports nothing of the project).

Three processes: this one stays outside and maps user ids; its child enters new namespaces and makes the file tree; its
grandchild is process 1 of the jail, gives up its privileges and executes the harness.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW = {"user": 0x10000000, "mount": 0x00020000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_NOBODY = 65534
_INODES = 10_000
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_… of linux/audit.h."""
_REFUSED = {
    # memory that no limit of a process counts
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217),
    # other name spaces and file trees
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    # parts of the kernel that programs of this kind do without
    "ptrace": (101, 117), "process_vm_writev": (311, 271), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
"""System calls that fail in the jail, with their numbers on x86_64 and aarch64."""


def main() -> None:
    root, place = sys.argv[1], json.loads(sys.argv[2])
    _die_with_parent()
    entered, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _end_after(lambda: _inside(root, place, entered[1], mapped[0]))
    os.close(entered[1])
    if not os.read(entered[0], 1):  # it could not enter, and has said why
        sys.exit(_ended(child))
    _map_ids(child)
    os.write(mapped[1], b".")
    sys.exit(_ended(child))


def _map_ids(child: int) -> None:
    """As root, nobody exists inside beside root; as anyone else, the program runs as oneself, by the name of nobody."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        maps = {"uid_map": f"0 0 1\n{_NOBODY} {_NOBODY} 1\n", "gid_map": f"0 0 1\n{_NOBODY} {_NOBODY} 1\n"}
    else:
        maps = {"setgroups": "deny", "uid_map": f"{_NOBODY} {user} 1\n", "gid_map": f"{_NOBODY} {group} 1\n"}
    for name, content in maps.items():
        with open(f"/proc/{child}/{name}", "w", encoding="utf-8") as file:
            file.write(content)


def _inside(root: str, place: dict[str, Any], entered: int, mapped: int) -> int:
    _die_with_parent()
    _call("unshare", sum(_NEW.values()))
    os.write(entered, b".")
    os.read(mapped, 1)
    _make_tree(root, place)
    first = os.fork()
    if first == 0:
        _end_after(lambda: _become_harness(place))
    return _ended(first)


def _make_tree(root: str, place: dict[str, Any]) -> None:
    """A memory file system with what the program may see, as the root of everything."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("jail", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={place['disk_mib'] + 1}m,nr_inodes={_INODES},mode=755")
    for path in place["shown"]:
        _show(path, root)
    os.makedirs(f"{root}/dev")
    for device in _DEVICES:
        _bind(f"/dev/{device}", f"{root}/dev/{device}", file=True)
    for name, mode in (("proc", 0o755), ("tmp", 0o1777), ("harness", 0o755)):
        os.makedirs(f"{root}/{name}", exist_ok=True)
        os.chmod(f"{root}/{name}", mode)
    with open(place["harness"], encoding="utf-8") as source, open(f"{root}/harness/harness.py", "w", encoding="utf-8") as copy:
        copy.write(source.read())
    os.chdir(root)
    _check(_LIBC.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")


def _show(path: str, root: str) -> None:
    if os.path.islink(path):
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(os.readlink(path), root + path)
    elif not os.path.exists(root + path):  # else it is within what is shown already
        _bind(path, root + path, file=os.path.isfile(path))
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
        arguments = (_AT_FDCWD, os.fsencode(root + path), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
        _check(_LIBC.syscall(_MOUNT_SETATTR, *arguments), f"mount_setattr {path}")


def _bind(source: str, target: str, file: bool) -> None:
    os.makedirs(os.path.dirname(target) if file else target, exist_ok=True)
    if file:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(source, target, None, _MS_BIND | _MS_REC)


def _become_harness(place: dict[str, Any]) -> NoReturn:
    """Process 1 of the jail."""
    with contextlib.suppress(OSError):  # a container's masked /proc forbids a new one; Python does without
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)  # where the machine's own is still in sight
        with open(
            "/proc/sys/user/max_user_namespaces", "w", encoding="utf-8"
        ) as file:  # of the jail: in another it would be root again
            file.write("0")
    _check(_LIBC.umount2(b".", _MNT_DETACH), "umount2")  # the machine's tree, which pivot_root has put on top
    os.chdir("/tmp")
    megabyte = 1 << 20
    limits = {
        resource.RLIMIT_CPU: place["cpu_s"],
        resource.RLIMIT_AS: place["memory_mib"] * megabyte,
        resource.RLIMIT_NPROC: place["processes"] + 1,
        resource.RLIMIT_FSIZE: place["disk_mib"] * megabyte,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, limit in limits.items():
        resource.setrlimit(what, (limit, limit))
    if os.getuid() == 0:  # the kernel counts no processes of the machine's root
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _refuse_calls()
    _die_with_parent()  # a change of user has taken it back
    os.execve(place["python"], [place["python"], "-I", "/harness/harness.py"], {"HOME": "/tmp", "PATH": "/usr/bin:/bin"})


def _refuse_calls() -> None:
    """From now on some system calls, and those of other instruction sets, fail with EPERM (linux/seccomp.h, linux/filter.h)."""
    machine = platform.machine()
    refused = [numbers[list(_ARCHITECTURE).index(machine)] for numbers in _REFUSED.values()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    fail = len(refused) + 5  # place of the last instruction
    program = [(load, 0, 0, 4), (equal, 0, fail - 2, _ARCHITECTURE[machine]), (load, 0, 0, 0), (at_least, fail - 4, 0, 1 << 30)]
    program += [(equal, fail - place - 1, 0, number) for place, number in enumerate(refused, len(program))]
    program += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.EPERM)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    _call("prctl", _PR_SET_SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(filters)), 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _check(_LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _call(name: str, *arguments: int | bytes) -> None:
    _check(getattr(_LIBC, name)(*arguments), name)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _die_with_parent() -> None:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end_after(action: Callable[[], int]) -> NoReturn:
    """What a forked child does; it never returns into the parent's code."""
    code = 1
    try:
        code = action()
    except OSError as error:
        os.write(2, f"{error.strerror}\n".encode())
    finally:
        os._exit(code if 0 <= code < 256 else 1)


if __name__ == "__main__":
    main()
