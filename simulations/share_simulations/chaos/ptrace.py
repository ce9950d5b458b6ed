"""A tracer of file-changing system calls: see each one before it runs, and let it go, fail it, or kill the process.

Linux on x86-64 only, pure Python: the child is forked here, so it costs no interpreter start, and a seccomp filter in
it stops nothing but the calls that change files. The thread that calls :func:`trace` is the tracer of all threads of
the child; a child never outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

from share_core.errors import ConfigError

_CONT, _GETREGS, _SETREGS, _SYSCALL, _SEIZE = 7, 12, 13, 24, 0x4206
_OPTIONS = 0x1 | 0x8 | 0x80 | 0x100000  # SYSGOOD, CLONE, SECCOMP, EXITKILL
_EVENT_SECCOMP = 7
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_AT_FDCWD = 0xFFFFFF9C
_CREATES = os.O_CREAT | os.O_TRUNC
_NO_SYSCALL = 2**64 - 1
_MAX_PATH = 4096


_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax "
    "rip cs eflags rsp ss fs_base gs_base ds es fs gs"
)


class _Regs(ctypes.Structure):
    """``struct user_regs_struct``."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS.split()]


_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Shape(Enum):
    """Where a call carries what it works on."""

    FD = "fd"
    WRITE = "fd, buffer, size"
    PWRITE = "fd, buffer, size, offset"
    LENGTH = "fd, length"
    PATH = "path"
    AT = "dirfd, path"
    TWO_PATHS = "path, path"
    TWO_AT = "dirfd, path, dirfd, path"


_CALLS: dict[int, tuple[str, _Shape]] = {
    1: ("write", _Shape.WRITE),
    18: ("pwrite64", _Shape.PWRITE),
    20: ("writev", _Shape.FD),
    40: ("sendfile", _Shape.FD),
    74: ("fsync", _Shape.FD),
    75: ("fdatasync", _Shape.FD),
    76: ("truncate", _Shape.PATH),
    77: ("ftruncate", _Shape.LENGTH),
    82: ("rename", _Shape.TWO_PATHS),
    83: ("mkdir", _Shape.PATH),
    84: ("rmdir", _Shape.PATH),
    85: ("creat", _Shape.PATH),
    86: ("link", _Shape.TWO_PATHS),
    87: ("unlink", _Shape.PATH),
    258: ("mkdirat", _Shape.AT),
    263: ("unlinkat", _Shape.AT),
    264: ("renameat", _Shape.TWO_AT),
    265: ("linkat", _Shape.TWO_AT),
    277: ("sync_file_range", _Shape.FD),
    285: ("fallocate", _Shape.FD),
    296: ("pwritev", _Shape.FD),
    306: ("syncfs", _Shape.FD),
    316: ("renameat2", _Shape.TWO_AT),
    326: ("copy_file_range", _Shape.FD),
    # These two stop only when they create or truncate.
    2: ("open", _Shape.PATH),
    257: ("openat", _Shape.AT),
}
_OPEN_FLAGS = {2: 1, 257: 2}
"""Number of the argument that holds the flags."""


@dataclass(frozen=True)
class Call:
    """One file-changing call below the watched directory, before it runs."""

    thread: int
    """Thread that makes it."""
    name: str
    """Name of the system call."""
    path: str
    """Absolute path it works on; of a rename or link the old one."""
    target: str = ""
    """New path of a rename or link."""
    flags: int = 0
    """Flags of an open."""
    size: int = 0
    """Bytes to write, or length after a truncation."""
    offset: int = -1
    """Where a ``pwrite64`` begins; -1: at the position of the file, see :attr:`position`."""
    position: int = 0
    """Position of the file of a ``write``, read only for a handler that wants data."""
    data: bytes = b""
    """Bytes to write, read only for a handler that wants data."""


@dataclass(frozen=True)
class Verdict:
    """What happens to a call."""

    kill: bool = False
    """End the whole process with SIGKILL before the call runs."""
    error: int = 0
    """Let the call fail with this errno, without running."""
    short: int = 0
    """Let a write take only so many bytes."""


GO = Verdict()
KILL = Verdict(kill=True)


class Handler:
    """Base of what decides about calls; every method may be overridden."""

    wants_data = False
    """Whether :attr:`Call.data` and :attr:`Call.position` are read and :meth:`left` is called (slower)."""

    def entered(self, call: Call) -> Verdict:
        """Decide about a call that is about to run."""
        return GO

    def left(self, call: Call, result: int) -> None:
        """See the result of a call: negative is ``-errno``."""

    def marked(self, text: bytes) -> None:
        """See what the child is about to write to the marker descriptor."""


@dataclass(frozen=True)
class Ending:
    """How the child ended."""

    code: int
    """Exit code, or -1 if a signal ended it."""
    signal: int = 0
    """The signal, or 0."""


def require_tracer() -> None:
    """Refuse machines on which the tracer cannot work.

    Raises:
        ConfigError: this is not Linux on x86-64.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            f"the crash lab traces system calls and works on Linux x86-64 only, this is {sys.platform} "
            f"{platform.machine()}: run it on such a machine"
        )


def trace(
    main: Callable[[], int],
    root: Path,
    handler: Handler,
    *,
    marker: int = -1,
    log: Path | None = None,
    limit_s: int = 60,
) -> Ending:
    """Fork, run ``main`` in the child and put every file-changing call below ``root`` before ``handler``.

    Args:
        main: runs in the child; what it returns is the exit code.
        root: directory to watch, absolute and without symbolic links; calls elsewhere run unseen.
        handler: decides; it runs in this process.
        marker: descriptor whose writes are shown to :meth:`Handler.marked` instead.
        log: file that the child's stderr is appended to; none: it is thrown away.
        limit_s: a child that lives longer is ended with SIGALRM.

    Returns:
        How the child ended.

    Raises:
        ConfigError: this machine does not allow tracing.
    """
    require_tracer()
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        _child(main, ready, log, limit_s)
    os.close(ready)
    try:
        _attach(pid)
        os.write(go, b"1")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(go)
    with _Tracer(pid, str(root), handler, marker) as tracer:
        return tracer.run()


def run_child(main: Callable[[], int], *, log: Path | None = None, limit_s: int = 60) -> Ending:
    """Fork and run ``main`` in the child without tracing it; return how it ended."""
    pid = os.fork()
    if pid == 0:
        _be(main, log, limit_s)
    try:
        os.setpgid(pid, pid)  # so that Ctrl-C reaches the campaign only, and does not look like a hub that died
        return _ending(os.waitpid(pid, 0)[1])
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it had just ended
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise


def _child(main: Callable[[], int], ready: int, log: Path | None, limit_s: int) -> NoReturn:
    if os.read(ready, 1) != b"1":
        os._exit(2)
    os.close(ready)

    def filtered() -> int:
        _install_filter()
        return main()

    _be(filtered, log, limit_s)


def _be(main: Callable[[], int], log: Path | None, limit_s: int) -> NoReturn:
    """Be a child: never return into the parent's stack, whatever happens."""
    code = 3
    try:
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(limit_s)
        file = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 2)
        os.close(file)
        code = main()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _ending(status: int) -> Ending:
    if os.WIFSIGNALED(status):
        return Ending(-1, os.WTERMSIG(status))
    return Ending(os.WEXITSTATUS(status))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, thread: int, data: object) -> bool:
    """Return False if the thread is gone."""
    if _libc.ptrace(request, thread, None, data) != -1:
        return True
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        return False
    raise ConfigError(f"this machine does not allow tracing a child process: {os.strerror(number)}")


def _attach(pid: int) -> None:
    os.setpgid(pid, pid)  # so that the tracer waits for this child and for nobody else's
    if not _ptrace(_SEIZE, pid, ctypes.c_void_p(_OPTIONS)):
        raise ConfigError("the child to trace ended before it was traced: try again")


def _install_filter() -> None:
    """Let the kernel stop this process at file-changing calls only."""
    load, jump_equal, jump_set, leave = 0x20, 0x15, 0x45, 0x06
    allow, stop, machine = 0x7FFF0000, 0x7FF00000, 0xC000003E
    plain = [number for number in _CALLS if number not in _OPEN_FLAGS]
    # Laid out as: machine, number, plain calls, opens, allow, flags of each open, stop.
    end = 3 + len(plain) + len(_OPEN_FLAGS)
    last = end + 3 * len(_OPEN_FLAGS) + 1
    code = [(load, 0, 0, 4), (jump_equal, 0, end - 2, machine), (load, 0, 0, 0)]
    code += [(jump_equal, last - len(code) - at - 1, 0, number) for at, number in enumerate(plain)]
    for at, number in enumerate(_OPEN_FLAGS):
        code.append((jump_equal, end + 1 + 3 * at - len(code) - 1, 0, number))
    code.append((leave, 0, 0, allow))
    for argument in _OPEN_FLAGS.values():
        code.append((load, 0, 0, 16 + 8 * argument))
        code.append((jump_set, last - len(code) - 1, 0, _CREATES))
        code.append((leave, 0, 0, allow))
    code.append((leave, 0, 0, stop))
    packed = b"".join(struct.pack("=HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(buffer)), 16)
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program))):
        raise ConfigError(f"this machine does not allow a seccomp filter: {os.strerror(ctypes.get_errno())}")


class _Tracer:
    """The event loop over one traced child."""

    def __init__(self, pid: int, root: str, handler: Handler, marker: int) -> None:
        self._pid = pid
        self._root = root
        self._below = root.rstrip("/") + "/"
        self._handler = handler
        self._marker = marker
        self._regs = _Regs()
        self._inside: dict[int, Call] = {}
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> _Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)

    def run(self) -> Ending:
        """Serve the stops of all threads until the process has ended."""
        try:
            while True:
                thread, status = os.waitpid(-self._pid, _WALL)
                if not os.WIFSTOPPED(status):
                    if thread == self._pid:
                        return _ending(status)
                    continue
                self._stopped(thread, status)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # it had just ended
                os.kill(self._pid, signal.SIGKILL)
            self._reap()
            raise

    def _reap(self) -> None:
        """Wait until the killed process is gone with all its threads."""
        try:
            while True:
                os.waitpid(-self._pid, _WALL)
        except ChildProcessError:
            return

    def _stopped(self, thread: int, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._entered(thread)
        elif event:
            _ptrace(_CONT, thread, None)
        elif number == _SYSCALL_STOP:
            self._left(thread)
        else:
            _ptrace(_CONT, thread, ctypes.c_void_p(number))

    def _entered(self, thread: int) -> None:
        regs = self._regs
        if not _ptrace(_GETREGS, thread, ctypes.byref(regs)):
            return
        call = self._read_call(thread)
        verdict = GO if call is None else self._handler.entered(call)
        if verdict.kill:
            os.kill(self._pid, signal.SIGKILL)
            return
        if verdict.error:
            # A skipped call returns what stands in RAX; nothing runs.
            regs.orig_rax = _NO_SYSCALL
            regs.rax = 2**64 - verdict.error
            _ptrace(_SETREGS, thread, ctypes.byref(regs))
        elif verdict.short:
            regs.rdx = verdict.short
            _ptrace(_SETREGS, thread, ctypes.byref(regs))
        if call is not None and self._handler.wants_data:
            self._inside[thread] = call
            _ptrace(_SYSCALL, thread, None)
        else:
            _ptrace(_CONT, thread, None)

    def _left(self, thread: int) -> None:
        call = self._inside.pop(thread, None)
        if call is not None and _ptrace(_GETREGS, thread, ctypes.byref(self._regs)):
            self._handler.left(call, ctypes.c_longlong(self._regs.rax).value)
        _ptrace(_CONT, thread, None)

    def _read_call(self, thread: int) -> Call | None:
        """Return the call in the registers, or None if it is none of ours."""
        name, shape = _CALLS[self._regs.orig_rax]
        values = [int(getattr(self._regs, register)) for register in _ARGUMENTS]
        if shape in (_Shape.PATH, _Shape.AT, _Shape.TWO_PATHS, _Shape.TWO_AT):
            return self._path_call(thread, name, shape, values)
        if values[0] == self._marker:
            self._handler.marked(os.pread(self._memory, values[2], values[1]))
            return None
        path = self._of_descriptor(values[0])
        if not self._ours(path):
            return None
        size = values[2] if shape in (_Shape.WRITE, _Shape.PWRITE) else values[1] if shape is _Shape.LENGTH else 0
        offset = values[3] if shape is _Shape.PWRITE else -1
        data, position = b"", 0
        if self._handler.wants_data and shape in (_Shape.WRITE, _Shape.PWRITE):
            data = os.pread(self._memory, size, values[1])
            position = offset if offset >= 0 else self._position(values[0])
        return Call(thread, name, path, size=size, offset=offset, position=position, data=data)

    def _path_call(self, thread: int, name: str, shape: _Shape, values: list[int]) -> Call | None:
        at = shape in (_Shape.AT, _Shape.TWO_AT)
        path = self._resolve(values[0] if at else _AT_FDCWD, values[1] if at else values[0])
        target = ""
        if shape is _Shape.TWO_PATHS:
            target = self._resolve(_AT_FDCWD, values[1])
        elif shape is _Shape.TWO_AT:
            target = self._resolve(values[2], values[3])
        if not self._ours(path) and not self._ours(target):
            return None
        argument = _OPEN_FLAGS.get(self._regs.orig_rax)
        flags = 0 if argument is None else values[argument]
        return Call(thread, name, path, target, flags)

    def _ours(self, path: str) -> bool:
        return path == self._root or path.startswith(self._below)

    def _of_descriptor(self, descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/{self._pid}/fd/{ctypes.c_int(descriptor & 0xFFFFFFFF).value}")  # noqa: PTH115
        except OSError:
            return ""

    def _position(self, descriptor: int) -> int:
        first = Path(f"/proc/{self._pid}/fdinfo/{descriptor}").read_text("ascii").split("\n", 1)[0]
        return int(first.removeprefix("pos:"))

    def _resolve(self, directory: int, address: int) -> str:
        text = os.fsdecode(self._read_text(address))
        if text.startswith("/"):
            return os.path.normpath(text)
        here = directory & 0xFFFFFFFF
        base = os.readlink(f"/proc/{self._pid}/cwd") if here == _AT_FDCWD else self._of_descriptor(here)  # noqa: PTH115
        return os.path.normpath(f"{base}/{text}")

    def _read_text(self, address: int) -> bytes:
        """Return the C string at ``address``; read up to page borders, since the next page may not be there."""
        found = b""
        while len(found) < _MAX_PATH:
            part = os.pread(self._memory, 4096 - (address + len(found)) % 4096, address + len(found))
            if not part or b"\0" in part:
                return found + part.split(b"\0", 1)[0]
            found += part
        return found
