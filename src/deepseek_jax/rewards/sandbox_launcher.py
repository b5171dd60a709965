"""Builds the sandbox around itself, then runs the program in it. Standard library alone.

Run as a script by ``sandbox``, which explains what this keeps in; the settings are JSON in the
first argument. Three processes: the launcher; the first process of the new PID namespace, with
whose end the kernel kills all others; and the program.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import typing

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is every machine's
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error that a call of libc left."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """``prctl`` with one argument."""
    check(libc.prctl(option, *(ctypes.c_ulong(x) for x in (value, 0, 0, 0))), "prctl")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """``mount(2)``."""
    arguments = (source.encode(), target.encode(), kind.encode())
    flags_c = ctypes.c_ulong(flags)
    check(libc.mount(*arguments, flags_c, data.encode()), f"mount {target}")


def read_only(target: str) -> None:
    """A mount and all below it: nothing can be written, no device or set-user-id program works."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, size
    )
    check(result, f"mount_setattr {target}")


def enter_namespaces(root: bool) -> None:
    """New namespaces for mounts, processes, network, IPC and host name.

    Without root's rights they need a user namespace around them, in which this user is nobody.
    """
    uid, gid = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(libc.unshare(spaces | (0 if root else CLONE_NEWUSER)), "unshare")
    if not root:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def build_tree(tree: str, readable: list[str]) -> None:
    """A root directory of nothing but ``readable``, which cannot be written.

    ``tree`` is an empty directory; the file system in memory that is mounted on it is seen by
    this namespace alone.
    """
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", tree, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    for path in readable:
        inside = tree + path
        if os.path.islink(path):  # /lib -> usr/lib
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
            continue
        os.makedirs(inside if os.path.isdir(path) else os.path.dirname(inside), exist_ok=True)
        if not os.path.isdir(path):
            open(inside, "x").close()
        mount(path, inside, "none", MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            read_only(inside)


def write_files(tree: str, files: dict[str, str]) -> None:
    """The program and what it needs."""
    for name, text in files.items():
        with open(f"{tree}/{name}", "x", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)


def drop_root(uid: int) -> None:
    """To a user that owns nothing: root is exempt from the limit on processes.

    A user of this run's own, so that runs side by side do not use up each other's limit.
    """
    os.setgroups([])
    try:
        os.setresgid(uid, uid, uid)
    except OSError:  # the container maps few users
        uid = NOBODY
        os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def limit(limits: dict[str, int]) -> None:
    """``{"CPU": 3}`` and so on."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def wait(child: int) -> int:
    """The exit status of a child, as a shell gives it; other children are reaped."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def let_go_of_pipes() -> None:
    """Only the program holds its input and output, so that they end with it."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def main() -> typing.NoReturn:
    """Report "ok" or what failed to the descriptor ``report``, and run the program."""
    settings = json.loads(sys.argv[1])
    with os.fdopen(0, "rb", closefd=False) as file:
        payload = json.load(file)
    report, isolated, root = settings["report"], settings["isolated"], os.getuid() == 0
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    stdin = os.memfd_create("stdin")
    with os.fdopen(os.dup(stdin), "wb") as file:
        file.write(payload["stdin"].encode("utf-8", "surrogatepass"))
        file.flush()
        os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.close(stdin)
    try:
        if isolated:
            enter_namespaces(root)
            build_tree(settings["tree"], settings["readable"])
        write_files(settings["tree"], payload["files"])
        if isolated:
            flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
            mount("none", settings["tree"], "none", flags)
    except OSError as error:
        os.write(report, str(error).encode())
        os._exit(125)
    first = os.fork()
    if first:
        os.close(report)
        let_go_of_pipes()
        os._exit(wait(first))
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if isolated:
            prctl(PR_SET_DUMPABLE, 0)  # out of the program's reach
            os.chroot(settings["tree"])
        os.chdir("/" if isolated else settings["tree"])
        program = os.fork() if isolated else 0
        if program:
            os.close(report)
            for fd in (0, 1, 2):
                os.close(fd)
            os._exit(wait(program))
        if isolated and root:
            drop_root(settings["uid"])
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        limit(settings["limits"])
        os.write(report, b"ok")
        os.close(report)
        os.execve(settings["argv"][0], settings["argv"], settings["environment"])
    except OSError as error:
        os.write(report, str(error).encode())
    os._exit(125)


if __name__ == "__main__":
    main()
