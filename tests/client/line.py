"""A TCP line to a listener, which a test may cut: what a bad network or a relay that goes away looks like."""

from __future__ import annotations

import contextlib
import socket
import threading


class Line:
    """Forwards ``127.0.0.1:port`` to an address until :meth:`close`."""

    def __init__(self, target: str, port: int = 0) -> None:
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self.cut_after: int | None = None
        """Bytes towards the target after which the next connection is cut, once."""
        self.forwarded = 0
        """Bytes towards the target, all connections together."""
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._lock = threading.Lock()
        self._start(self._accept)

    def close(self) -> None:
        """End the line and every connection over it."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        while self._threads:
            self._threads.pop().join()

    def cut(self) -> None:
        """End every connection; new ones are taken."""
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _start(self, target: object, *arguments: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                if self._closed:  # nobody would cut it any more
                    near.close()
                    far.close()
                    return
                self._sockets += [near, far]
            ended = threading.Semaphore(0)
            self._start(self._pump, near, far, True, ended)
            self._start(self._pump, far, near, False, ended)
            self._start(self._bury, near, far, ended)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool, ended: threading.Semaphore) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sent += len(data)
                if up:
                    self.forwarded += len(data)
                    if self.cut_after is not None and sent >= self.cut_after:
                        self.cut_after = None
                        break
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        ended.release()

    def _bury(self, near: socket.socket, far: socket.socket, ended: threading.Semaphore) -> None:
        ended.acquire()
        ended.acquire()
        with self._lock:
            for one in (near, far):
                self._sockets.remove(one)
                one.close()
