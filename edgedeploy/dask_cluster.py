"""Builds and sessions on the workers of a Dask cluster: the executor of `edgedeploy run --scheduler`.

Tasks travel as pickles between processes that trust each other: whoever may connect to the scheduler may run code on
every worker, and a worker's answer is code to us. So a cluster of ours is behind TLS with certificates that exist only
in memory, and another scheduler than on this machine's loopback must be behind TLS too, unless the person insists.

Dask may start a task again where a worker died; a session must not be, for it would be measured twice. So each task is
bound to one worker process, and what happens when that dies is decided here: a build is done once more elsewhere, a
session goes on elsewhere from the steps that it had told. Journal and results are only ever written by this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import platform
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

import edgedeploy
from edgedeploy.build import MANIFEST, BuildRequest, Built, Progress, load_artifact, staging, stored_artifact
from edgedeploy.dispatch import SessionOrder, SessionResult, build_task, progress_of, session_task
from edgedeploy.documents import Record, read_toml
from edgedeploy.engines import is_tied_to_device
from edgedeploy.errors import DeviceError, DocumentError, EdgedeployError, ToolchainError, UsageError
from edgedeploy.journal import CellBuilt, Journal, Line, SessionStep, SessionStored
from edgedeploy.measure import RECONNECT_S, Stop, Stopped
from edgedeploy.results import Results
from edgedeploy.storage import cache_dir

LOCAL = "dask"
FORMAT = "edgedeploy.scheduler/1"
MISSING = "Dask, which --scheduler needs, is not installed here; pip install 'edgedeploy[dask]'"
CONNECT_S = 15.0
# How long to wait for a first worker: a cluster's own queue may still be starting them.
WORKERS_S = 60.0
# Sessions wait for their devices most of the time, so that a process may have several.
_THREADS_PER_WORKER = 8
_MOST_LOCAL_WORKERS = 4
# More tasks than devices and builds that any run has at a time.
_MOST_TASKS = 512
# How often a task's messages, and the life of its worker, are asked for.
_POLL_S = 0.25
_ATTEMPTS = 2
_ABANDONED_S = 30 * 24 * 3600.0  # longer than any run takes
_DEFAULT_PORT = 8786  # Dask's own
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_KEY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)

T = TypeVar("T")


class Credentials(Record, frozen=True, kw_only=True):
    """A security file: PEM files for a scheduler behind TLS, relative to it.

    Attributes:
        ca: who signs the certificates of all its processes.
        cert, key: ours.
    """

    format: str = FORMAT
    ca: str
    cert: str
    key: str


# ---------------------------------------------------------------- which cluster


@contextlib.contextmanager
def cluster(
    scheduler: str,
    *,
    security: Path | None = None,
    is_insecure: bool = False,
    workers: int = 0,
    progress: Progress = lambda text: None,
) -> Iterator[Cluster]:
    """Give an executor whose tasks run on a Dask cluster.

    Args:
        scheduler: "dask": a cluster of processes on this machine, for as long as the block lasts; else the address of
            one that runs: "dask://host:port" or "tcp://host:port" without encryption, "tls://host:port".
        security: the PEM files for TLS; see `Credentials`.
        is_insecure: go without TLS also to another machine.
        workers: processes of a local cluster; 0: as many as there are cores, at most 4.
        progress: told what happens.

    Raises:
        UsageError: the address cannot be meant, or needs TLS.
        ToolchainError: Dask is missing, or the scheduler cannot be reached.
    """
    try:
        import distributed
    except ImportError as error:
        raise ToolchainError(MISSING) from error

    with contextlib.ExitStack() as stack:
        if scheduler == LOCAL:
            client = _local_client(stack, workers or min(_MOST_LOCAL_WORKERS, max(2, os.cpu_count() or 1)), progress)
        else:
            address = _address(scheduler, security, is_insecure)
            progress(f"connecting to the Dask scheduler {address}")
            try:
                client = distributed.Client(
                    address, security=_security(address, security), timeout=CONNECT_S, set_as_default=False
                )
            except (OSError, ValueError, TypeError) as error:
                raise ToolchainError(
                    f"the Dask scheduler {address} cannot be reached ({error}); is it running there, and does it speak "
                    f"{urlsplit(address).scheme}?"
                ) from error
            stack.callback(client.close)
        yield stack.enter_context(Cluster(client, progress))


def _local_client(stack: contextlib.ExitStack, workers: int, progress: Progress) -> Any:
    """Start processes on this machine that only this one can talk to."""
    import dask
    import distributed

    try:
        security = distributed.Security.temporary()
    except ImportError as error:
        raise ToolchainError(f"{MISSING} (cryptography is missing)") from error
    progress(f"starting {workers} Dask workers on this machine")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgedeploy-dask-", ignore_cleanup_errors=True))
    # Its HTTP server has no notion of who asks; it cannot be left out, but it can be left without a page.
    silent: dict[str, list[str]] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
    with dask.config.set(silent), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `dashboard`")  # where bokeh is installed workers need it
        local = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=_THREADS_PER_WORKER,
            processes=True,
            host="127.0.0.1",
            security=security,
            protocol="tls://",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            dashboard=False,
            memory_limit=None,  # a build may need most of the memory, and Dask would kill it for that
            local_directory=folder,
            silence_logs=logging.CRITICAL,
        )
    stack.callback(local.close)
    client = distributed.Client(local, security=security, set_as_default=False)
    stack.callback(client.close)
    return client


def _address(scheduler: str, security: Path | None, is_insecure: bool) -> str:
    """Return an address as Dask writes it.

    Raises:
        UsageError: it cannot be meant, or would send pickles in the clear over a network.
    """
    parts = urlsplit(scheduler)
    try:
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"--scheduler {scheduler}: {error}") from error
    if parts.scheme not in ("dask", "tcp", "tls") or not host or parts.path or parts.query or parts.username:
        raise UsageError(
            f"--scheduler {scheduler} is neither {LOCAL} nor an address such as dask://host:{_DEFAULT_PORT} or "
            f"tls://host:{_DEFAULT_PORT}"
        )
    written = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if parts.scheme == "tls":
        if security is None:
            raise UsageError(f"--scheduler {scheduler} needs --scheduler-security FILE, which names ca, cert and key")
        return f"tls://{written}"
    if security is not None:
        raise UsageError(f"--scheduler-security is for tls://{written}; with {parts.scheme}:// nothing is encrypted")
    if not is_insecure and not _is_loopback(host):
        raise UsageError(
            f"--scheduler {scheduler}: whoever can reach or overhear that connection can run code on this machine and "
            f"on every worker; use tls://{written} with --scheduler-security, a tunnel (ssh -L {port}:localhost:{port} "
            f"{host}) with dask://localhost:{port}, or --scheduler-insecure where the network is yours alone"
        )
    return f"tcp://{written}"


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--scheduler: the name {host!r} does not resolve ({error})") from error
    return all(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def _security(address: str, file: Path | None) -> Any:
    import distributed

    if file is None:
        return distributed.Security(require_encryption=False)
    said = read_toml(file, Credentials, FORMAT)
    paths = {key: file.parent / Path(getattr(said, key)).expanduser() for key in ("ca", "cert", "key")}
    for key, path in paths.items():
        if not path.is_file():
            raise DocumentError(f"{file} names the {key} {path}, which is no file")
    return distributed.Security(
        tls_ca_file=str(paths["ca"]),
        tls_client_cert=str(paths["cert"]),
        tls_client_key=str(paths["key"]),
        require_encryption=True,
    )


# ---------------------------------------------------------------- this process's side


@dataclass(frozen=True, slots=True)
class Ours:
    """What a worker is compared with.

    Attributes:
        folder: where the run was started: relative paths and targets/ are looked up there.
        mark: name of a file in our cache; nonce: what is in it.
    """

    folder: str
    cache: str
    mark: str
    nonce: str
    boot: str


@dataclass(slots=True)
class _Worker:
    """A worker process.

    Attributes:
        id: Dask's, of this process and no other at its address.
        shares_cache: whether our artifacts are its artifacts; is_here: whether it runs on this machine.
        problem: why it gets no tasks; "" when it does.
        running: how many tasks it has of ours.
    """

    id: str = ""
    threads: int = 1
    shares_cache: bool = False
    is_here: bool = False
    problem: str = ""
    running: int = 0


@dataclass(frozen=True, slots=True)
class Errand:
    """A task on its way.

    Attributes:
        key: of the task, and of the queue of what it tells.
        worker: id of the process that it is for.
        folder: where relative paths start.
    """

    key: str
    worker: str
    folder: str


class Told(msgspec.Struct, frozen=True, tag="told"):
    """A worker's progress."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A line for the journal."""

    line: SessionStep | CellBuilt


_DECODER = msgspec.json.Decoder(Told | Done)
Hear = Callable[[Told | Done], None]


@dataclass(frozen=True, slots=True)
class _Lost:
    """The worker died, or another process has its address now."""

    worker: str


class Cluster(Executor):
    """Runs `build_task` and `session_task` on the workers of a cluster; see the module.

    Args:
        client: connected.
        progress: told what happens, also by tasks; lines of sessions go to its `device(name)` where it has that.
    """

    def __init__(self, client: Any, progress: Progress) -> None:
        self._client, self._progress = client, progress
        self._threads = ThreadPoolExecutor(_MOST_TASKS, thread_name_prefix="dask task")
        self._lock = threading.Lock()
        self._workers: dict[str, _Worker] = {}
        self._alive: tuple[float, frozenset[str]] = (0.0, frozenset())
        self._is_closing = threading.Event()
        cache = cache_dir()
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(".dask-*"):  # by runs that were killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()
        nonce = secrets.token_hex(16)
        self._mark = cache / f".dask-{nonce[:8]}"
        self._mark.write_text(nonce, encoding="ascii")
        self._ours = Ours(str(Path.cwd()), str(cache.resolve()), self._mark.name, nonce, _boot())

    @property
    def builders(self) -> int:
        """Return how many builds are useful at a time: one per worker, for each may need all of its memory."""
        return max(1, len(self._fit()))

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have a build or a session done; the future raises what the task raised."""
        tasks: dict[object, Callable[..., Any]] = {build_task: self._build, session_task: self._session}
        if function not in tasks or kwargs:
            raise TypeError(f"{function} is no task that a cluster can do")
        return self._threads.submit(tasks[function], *args)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; with `cancel_futures` also what is still running."""
        if cancel_futures:
            self._is_closing.set()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._mark.unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        self.shutdown(cancel_futures=any(exception))

    # --- tasks

    def _build(self, request: BuildRequest) -> Built:
        """Build on a worker, and once more on another where that dies."""
        request = dataclasses.replace(
            request,
            base=request.base.absolute(),
            weights=request.weights and request.weights.absolute(),
            calibration=request.calibration and request.calibration.absolute(),
        )

        def hear(said: Told | Done) -> None:
            if isinstance(said, Told):
                self._progress(said.text)

        lost: list[str] = []
        while len(lost) < _ATTEMPTS:
            address, worker = self._chosen(avoid=lost)
            answer = self._done(address, worker, hear, _built_there, request, worker.shares_cache)
            if isinstance(answer, _Lost):
                lost.append(answer.worker)
                self._progress(f"{request.name}: the Dask worker {answer.worker} died while it built")
                continue
            built, files = answer
            return _unpacked(built, files) if files else built
        raise ToolchainError(
            f"{request.name} could not be built: each of the Dask workers {' and '.join(lost)} died over it; have they "
            "enough memory?"
        )

    def _session(self, order: SessionOrder) -> SessionResult:
        """Measure on a worker; where that dies, the session goes on on another from what it had told."""
        tell = progress_of(self._progress, order.request.device_name)
        if self._belongs_here(order):
            return session_task(order, tell)
        journal, steps, session = order.journal, list(order.done), [order.session]

        def hear(said: Told | Done) -> None:
            if isinstance(said, Told):
                tell(said.text)
                return
            if isinstance(said.line, SessionStep):
                steps.append(said.line.did)
                session[0] = said.line.session
            if journal is not None:
                journal.append(said.line)

        request = dataclasses.replace(
            order.request,
            evaluation=order.request.evaluation
            and dataclasses.replace(order.request.evaluation, path=order.request.evaluation.path.absolute()),
        )
        lost: list[str] = []
        while len(lost) < _ATTEMPTS:
            address, worker = self._chosen(avoid=lost)
            files = [] if worker.shares_cache else [_packed(built.folder) for _, built in request.sides]
            errand = dataclasses.replace(
                order,
                request=request,
                journal=None,
                session=session[0] if steps else "",
                done=tuple(steps),
            )
            answer = self._done(address, worker, hear, _measured_there, errand, files)
            if not isinstance(answer, _Lost):
                return _stored(order, answer)
            lost.append(answer.worker)
            tell(f"the Dask worker {answer.worker} died; the session goes on elsewhere at step {len(steps) + 1}")
            # What the dead one held on the device is free when that notices, at the latest when its lease expires.
            request = dataclasses.replace(request, wait_s=max(request.wait_s, RECONNECT_S))
        return SessionResult(
            state="failed",
            session=session[0] if steps else "",
            steps=tuple(steps),
            error=DeviceError(f"each of the Dask workers {' and '.join(lost)} died in the session of {order.cell}"),
        )

    def _belongs_here(self, order: SessionOrder) -> bool:
        """Say whether only this process can do a session: the device is this machine, or an engine would stay there."""
        fit = self._fit().values()
        if order.request.device.transport == "local" and not all(worker.is_here for worker in fit):
            return True
        is_tied = any(is_tied_to_device(built.artifact.recipe.backend) for _, built in order.request.sides)
        return is_tied and not all(worker.shares_cache for worker in fit)

    # --- workers

    def _fit(self) -> dict[str, _Worker]:
        """Return the workers that may get tasks, after looking at those that are new.

        Raises:
            EdgedeployError: there is none, with what is wrong with each.
        """
        deadline_s = time.monotonic() + WORKERS_S
        while True:
            with self._lock:
                threads = self._nthreads()
                for address in [one for one in self._workers if one not in threads]:
                    del self._workers[address]
                self._look_at({one: count for one, count in threads.items() if one not in self._workers})
                fit = {address: worker for address, worker in self._workers.items() if not worker.problem}
                problems = [f"{address} {worker.problem}" for address, worker in self._workers.items()]
            if fit:
                return fit
            if problems:
                raise EdgedeployError(f"no worker of the Dask cluster can be used: {'; '.join(problems)}")
            if time.monotonic() > deadline_s or self._is_closing.wait(_POLL_S):
                raise EdgedeployError(
                    f"the Dask scheduler has had no worker for {WORKERS_S:g} s; start one: dask worker"
                )

    def _nthreads(self) -> dict[str, int]:
        try:
            found = {str(address): int(count) for address, count in self._client.nthreads().items()}
        except (OSError, RuntimeError, TimeoutError) as error:
            raise EdgedeployError(
                f"the Dask scheduler was lost ({error}); what is measured is in the journal: edgedeploy run --resume"
            ) from error
        self._alive = (time.monotonic(), frozenset(found))
        return found

    def _look_at(self, new: dict[str, int]) -> None:
        """Ask new workers what they are; with the lock held."""
        if not new:
            return
        asked = functools.partial(self._client.run, workers=list(new), on_error="return")
        pythons = asked(platform.python_version)
        ours = ".".join(map(str, sys.version_info[:2]))
        same = [one for one in new if str(pythons[one]).startswith(f"{ours}.")]
        abouts = self._client.run(_about, self._ours, workers=same, on_error="return") if same else {}
        for address, threads in new.items():
            worker = _Worker(threads=max(1, threads))
            about = abouts.get(address)
            if address not in same:
                worker.problem = f"has Python {pythons[address]}, and tasks can only go to Python {ours}, which is here"
            elif not isinstance(about, tuple):
                worker.problem = f"has no edgedeploy {edgedeploy.__version__} ({type(about).__name__}: {about})"
            elif about[1] != edgedeploy.__version__:
                worker.problem = f"has edgedeploy {about[1]}, and here is {edgedeploy.__version__}; install that there"
            elif not about[2]:
                worker.problem = f"does not see {self._ours.folder}, where this run was started; mount it there too"
            else:
                worker.id, _, _, worker.shares_cache, worker.is_here = about
            if worker.problem:
                self._progress(f"the Dask worker {address} {worker.problem}; it is not used")
            self._workers[address] = worker

    def _chosen(self, avoid: list[str]) -> tuple[str, _Worker]:
        """Return the worker with the fewest tasks of ours per thread, another one than those that died if there is."""
        fit = self._fit()
        load = {address: worker.running / worker.threads for address, worker in fit.items()}
        address = min(fit, key=lambda one: (one in avoid, load[one], one))
        return address, fit[address]

    def _is_alive(self, address: str) -> bool:
        """Say whether a worker is connected to the scheduler; asked once in a while for all tasks together."""
        asked_s, alive = self._alive
        if time.monotonic() > asked_s + _POLL_S:
            with self._lock:
                self._nthreads()
            _, alive = self._alive
        return address in alive

    def _done(self, address: str, worker: _Worker, hear: Hear, function: Callable[..., T], *args: Any) -> T | _Lost:
        """Do a task on one worker process, and hear what it tells meanwhile.

        Raises:
            EdgedeployError: the task did, or the scheduler was lost.
        """
        import distributed

        errand = Errand(f"edgedeploy-{secrets.token_hex(8)}", worker.id, self._ours.folder)
        box = distributed.Queue(errand.key, client=self._client)
        with self._lock:
            worker.running += 1
        future = self._client.submit(
            _there,
            errand,
            function,
            args,
            key=errand.key,
            workers=[address],
            allow_other_workers=False,
            retries=0,
            pure=False,
        )
        is_over = threading.Event()
        future.add_done_callback(lambda _: is_over.set())
        try:
            while not is_over.wait(_POLL_S):
                if self._is_closing.is_set():
                    raise EdgedeployError("the run was interrupted while a Dask worker was at it")
                is_alive = self._is_alive(address)
                _hear(box, hear)
                if not is_alive:
                    return _Lost(address)
            _hear(box, hear)
            if future.status == "cancelled":
                raise EdgedeployError(
                    "the Dask scheduler dropped a task (was it restarted?); what is measured is in the journal: "
                    "edgedeploy run --resume"
                )
            answer: T | _Lost | EdgedeployError = future.result()
        except distributed.KilledWorker:
            return _Lost(address)
        finally:
            with self._lock:
                worker.running -= 1
            future.cancel(force=True)
            box.close()
        if isinstance(answer, EdgedeployError):
            raise answer
        return answer


def _hear(box: Any, hear: Hear) -> None:
    """Take what a task has told until now."""
    for text in box.get(batch=True):
        hear(_DECODER.decode(text))


def _stored(order: SessionOrder, result: SessionResult) -> SessionResult:
    """Store the runs of a session that a worker has measured, as `session_task` does."""
    if result.state != "measured":
        return result
    store = Results(order.results)
    files = tuple(str(store.save_run(run)) for run in result.runs)
    if order.journal is not None:
        first = result.runs[0]
        line = SessionStored(cell=order.cell, session=first.session, device=first.device, files=(files[0], files[1]))
        order.journal.append(line)
    return dataclasses.replace(result, files=files)


# ---------------------------------------------------------------- artifacts as bytes


def _packed(folder: Path) -> dict[str, bytes]:
    """Return the files of an artifact's folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def _unpacked(built: Built, files: dict[str, bytes]) -> Built:
    """Put an artifact into this process's cache, verified, and return it from there.

    Raises:
        EdgedeployError: a name is none of an artifact's.
        DocumentError: the files are not what the manifest describes.
    """
    key = built.artifact.key
    if _KEY.fullmatch(key) is None or not all(_FILE_NAME.fullmatch(name) for name in files) or MANIFEST not in files:
        raise EdgedeployError(f"a Dask worker sent no artifact but {key!r:.80} with {sorted(files)[:10]!r:.200}")
    folder = cache_dir() / "artifacts" / key
    there = stored_artifact(folder, key)
    if there is None or there.sha256 != built.artifact.sha256:
        with staging(folder) as work:
            for name, data in files.items():
                (work / name).write_bytes(data)
            load_artifact(work)
    return dataclasses.replace(load_artifact(folder), is_cached=built.is_cached)


# ---------------------------------------------------------------- the worker's side


def _boot() -> str:
    """Return what tells this machine's boot from every other; "" where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _about(ours: Ours, dask_worker: Any = None) -> tuple[str, str, bool, bool, bool]:
    """Return (id, version, whether the folder, the cache, the machine are the same) of the worker that asks."""
    cache = cache_dir()
    mark = cache / ours.mark
    is_shared = str(cache.resolve()) == ours.cache and mark.is_file() and mark.read_text(encoding="ascii") == ours.nonce
    is_here = is_shared and bool(ours.boot) and _boot() == ours.boot
    return str(dask_worker.id), edgedeploy.__version__, Path(ours.folder).is_dir(), is_shared, is_here


def _there(errand: Errand, function: Callable[..., T], args: tuple[Any, ...]) -> T | _Lost | EdgedeployError:
    """Do a task in a worker, if that is the process that it is for."""
    import distributed

    worker = distributed.get_worker()
    if str(worker.id) != errand.worker:
        return _Lost(str(worker.address))
    box = distributed.Queue(errand.key)

    def tell(said: Told | Done) -> None:
        box.put(msgspec.json.encode(said).decode())

    with _in_folder(errand.folder), _until_unwanted(worker, errand.key) as stop:
        try:
            return function(tell, stop, *args)
        except EdgedeployError as error:  # as a value: Dask would log it
            return portable(error)
        except Stopped:
            return EdgedeployError("nobody waits for this task any more")


def portable(error: EdgedeployError) -> EdgedeployError:
    """Return an error without what only this process knows: where it was raised, and causes that are not ours."""
    make, arguments, *_ = error.__reduce__()
    copy: EdgedeployError = make(*arguments)
    copy.__cause__ = portable(error.__cause__) if isinstance(error.__cause__, EdgedeployError) else None
    return copy


_folder_changed = threading.Condition()
_folder_users = 0


@contextlib.contextmanager
def _in_folder(folder: str) -> Iterator[None]:
    """Work in a folder, after the tasks of this process that work in another one: a process can only be in one."""
    global _folder_users  # noqa: PLW0603 - as is the working directory
    with _folder_changed:
        _folder_changed.wait_for(lambda: _folder_users == 0 or str(Path.cwd()) == folder)
        os.chdir(folder)
        _folder_users += 1
    try:
        yield
    finally:
        with _folder_changed:
            _folder_users -= 1
            _folder_changed.notify_all()


@contextlib.contextmanager
def _until_unwanted(worker: Any, key: str) -> Iterator[Stop]:
    """Give a stop that is requested when the scheduler forgets a task: its client has ended, or died."""
    stop, is_over = Stop(), threading.Event()

    def watch() -> None:
        while not is_over.wait(_POLL_S):
            task = worker.state.tasks.get(key)
            if task is None or task.state not in ("ready", "executing", "long-running"):
                _log.warning("nobody waits for %s any more", key)
                stop.request()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        is_over.set()
        watcher.join()


def _built_there(tell: Hear, stop: Stop, request: BuildRequest, shares_cache: bool) -> tuple[Built, dict[str, bytes]]:
    """Build; return the artifact's files too where the cache is not that of the client."""
    built = build_task(request, lambda text: tell(Told(text)))
    return built, {} if shares_cache else _packed(built.folder)


def _measured_there(tell: Hear, stop: Stop, order: SessionOrder, files: list[dict[str, bytes]]) -> SessionResult:
    """Measure; each step is told before the next begins, and the client stores the runs."""
    sides = order.request.sides
    if files:
        sides = tuple((cell, _unpacked(built, one)) for (cell, built), one in zip(sides, files, strict=True))
    with tempfile.TemporaryDirectory(prefix="edgedeploy-session-") as folder:
        order = dataclasses.replace(
            order,
            request=dataclasses.replace(order.request, sides=sides),
            journal=TellingJournal(Path(folder), tell),
            results=Path(folder),
        )
        result = session_task(order, lambda text: tell(Told(text)), stop)
    return dataclasses.replace(result, files=(), error=result.error and portable(result.error))


@dataclass(frozen=True, slots=True)
class TellingJournal(Journal):
    """A journal that another process writes; `path` is of no use."""

    tell: Hear = field(default=lambda said: None)

    def append(self, line: Line) -> None:
        """Tell a line; that of the stored runs is for whoever stores them."""
        if isinstance(line, SessionStep | CellBuilt):
            self.tell(Done(line))
