"""A device and a source in Python, against a real shootdownd. Made from the .proto files alone.

    python tests/python/run.py --daemon target/debug/shootdownd

Prints a line a test and `N passed, M failed`; exits with 1 if one failed.
"""

import argparse
import concurrent.futures
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import grpc

from device import Device, Refused, SessionLost, now
from source import Source
from stubs import generate

PB, SERVICES = generate()
PAGE = 4096
START = 0x7F00_0000_0000
BOUND = 30  # seconds: how long anything is waited for before the test fails
# How long an ack is held back: long against a round trip, short against --ack-timeout below.
DELAY = 0.3


class Host:
    """A shootdownd of its own, and the stubs of a program beside it."""

    def __init__(self, daemon, folder, lease="20s", more=()):
        folder.mkdir()
        self.folder = folder
        devices, sources = folder / "device.sock", folder / "source.sock"
        flags = [f"--listen=unix:{devices}", f"--source-listen=unix:{sources}"]
        flags += ["--ack-timeout=10s", f"--lease={lease}", "--drain-timeout=1s", *more]
        self.process = subprocess.Popen([daemon, *flags])
        self.devices = connect(devices)
        self.bulk = connect(devices)  # bulk bytes never share a connection with a session
        self.sources = connect(sources)
        for channel in (self.devices, self.bulk, self.sources):
            grpc.channel_ready_future(channel).result(BOUND)
        self.memory = SERVICES.MemoryServiceStub(self.sources)
        self.notifier = SERVICES.NotifierServiceStub(self.sources)

    def device(self, name, before_ack=lambda notice: None):
        device, pages = SERVICES.DeviceServiceStub(self.devices), SERVICES.PageServiceStub(self.bulk)
        return Device(device, pages, PB, name, before_ack)

    def stop(self):
        for channel in (self.devices, self.bulk, self.sources):
            channel.close()
        self.process.terminate()
        return self.process.wait(BOUND)


def connect(socket):
    """A connection of its own to a Unix socket."""
    options = [
        # gRPC's C core makes the socket's path the `:authority`, which is none that HTTP/2 allows.
        ("grpc.default_authority", "localhost"),
        # It would share one connection among all channels to an address.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.insecure_channel(f"unix:{socket}", options=options)


def pages(first, end):
    return PB.AddressRange(start=START + first * PAGE, end=START + end * PAGE)


def mapped(host, count):
    """An address space with `count` pages mapped."""
    space = host.memory.CreateAddressSpace(PB.CreateAddressSpaceRequest(name="python")).address_space_id
    area = pages(0, count)
    host.memory.Map(PB.MapRequest(address_space_id=space, range=area, access=PB.ACCESS_WRITE))
    return space


class HeldAck:
    """Holds an ack back until it is let go."""

    def __init__(self):
        self.flushed, self.go = threading.Event(), threading.Event()

    def __call__(self, notice):
        self.flushed.set()
        if not self.go.wait(BOUND):
            raise TimeoutError("nobody let the ack go")


def unmap_waits_for_a_device_in_another_language(host, threads):
    held = HeldAck()
    device = host.device("python0", held)
    space = mapped(host, 4)
    host.memory.Store(PB.StoreRequest(address_space_id=space, address=START, data=b"\x5a"))
    device.subscribe(space, START, START + 4 * PAGE)
    grant = device.fault(space, START, START + PAGE, PB.ACCESS_READ)
    assert [t.range for t in grant.translations] == [pages(0, 1)], grant
    assert device.read(space, START, 1) == b"\x5a"
    frame = grant.translations[0].frame

    started = time.monotonic()
    unmap = threads.submit(host.memory.Unmap, PB.UnmapRequest(address_space_id=space, range=pages(0, 4)))
    assert held.flushed.wait(BOUND), "no notice came"
    # The device has flushed and not said so: the page must stay what it was.
    concurrent.futures.wait([unmap], timeout=DELAY)
    assert not unmap.done(), "munmap returned without the ack"
    assert device.read_frame(frame, 0, 1) == b"\x5a", "the page was reused without the ack"
    let_go = time.monotonic()
    held.go.set()
    assert unmap.result(BOUND).pages_released == 1
    assert time.monotonic() - started >= let_go - started >= DELAY
    assert device.read_frame(frame, 0, 1) != b"\x5a", "the page was not released"
    assert not device.tlb
    device.leave()


def a_fault_during_an_invalidation_gets_the_page_that_comes_after_it(host, threads):
    held = HeldAck()
    device = host.device("python1", held)
    space = mapped(host, 2)
    host.memory.Store(PB.StoreRequest(address_space_id=space, address=START, data=b"\x5a"))
    device.subscribe(space, START, START + 2 * PAGE)
    device.fault(space, START, START + PAGE, PB.ACCESS_READ)
    drop = threads.submit(host.memory.DontNeed, PB.DontNeedRequest(address_space_id=space, range=pages(0, 1)))
    assert held.flushed.wait(BOUND), "no notice came"
    fault = threads.submit(device.fault, space, START, START + PAGE, PB.ACCESS_READ)
    elsewhere = threads.submit(device.fault, space, START + PAGE, START + 2 * PAGE, PB.ACCESS_READ)
    held.go.set()
    assert drop.result(BOUND).pages_released == 1
    assert len(fault.result(BOUND).translations) == 1
    assert len(elsewhere.result(BOUND).translations) == 1
    assert device.read(space, START, 1) == b"\0"
    device.leave()


def nothing_is_waited_for_after_unsubscribed(host, threads):
    device = host.device("python2")
    space = mapped(host, 1)
    subscription = device.subscribe(space, START, START + PAGE)
    device.fault(space, START, START + PAGE, PB.ACCESS_READ)
    device.unsubscribe(subscription)
    host.memory.Unmap(PB.UnmapRequest(address_space_id=space, range=pages(0, 1)), timeout=BOUND)
    assert device.last_notice == 0, "a notice came after Unsubscribed"
    assert refused(lambda: device.fault(space, START, START + PAGE, PB.ACCESS_READ)) == "FAULT_NOT_SUBSCRIBED"
    device.leave()


def leave_stands_for_an_ack_of_everything(host, threads):
    held = HeldAck()
    device = host.device("python3", held)
    space = mapped(host, 1)
    device.subscribe(space, START, START + PAGE)
    device.fault(space, START, START + PAGE, PB.ACCESS_READ)
    unmap = threads.submit(host.memory.Unmap, PB.UnmapRequest(address_space_id=space, range=pages(0, 1)))
    assert held.flushed.wait(BOUND), "no notice came"
    leaving = threads.submit(device.leave)
    assert unmap.result(BOUND).pages_released == 1
    held.go.set()
    leaving.result(BOUND)


def a_source_in_another_language_is_told_who_is_missing(host, threads):
    held = HeldAck()
    device = host.device("python4", held)
    space = host.notifier.RegisterAddressSpace(PB.RegisterAddressSpaceRequest(name="vmm")).address_space_id
    device.subscribe(space, START, START + PAGE)
    start = dict(address_space_id=space, range=pages(0, 1), cause=PB.CAUSE_UNMAP)

    result = host.notifier.InvalidateRangeStart(PB.InvalidateRangeStartRequest(non_blockable=True, **start)).result
    assert result.verdict == PB.VERDICT_WOULD_BLOCK and device.last_notice == 0

    result = host.notifier.InvalidateRangeStart(PB.InvalidateRangeStartRequest(deadline_ms=50, **start)).result
    assert result.verdict == PB.VERDICT_NOT_QUIESCED
    assert [(t.device_id, t.outcome) for t in result.targets] == [("python4", PB.TARGET_OUTCOME_WAITING)]

    wait = PB.AwaitRoundRequest(address_space_id=space, seq=result.seq, deadline_ms=0)
    assert host.notifier.AwaitRound(wait).result.verdict == PB.VERDICT_NOT_QUIESCED
    held.go.set()
    wait = PB.AwaitRoundRequest(address_space_id=space, seq=result.seq)
    assert host.notifier.AwaitRound(wait, timeout=BOUND).result.verdict == PB.VERDICT_QUIESCED
    host.notifier.InvalidateRangeEnd(PB.InvalidateRangeEndRequest(address_space_id=space, seq=result.seq))
    released = PB.ReleaseAddressSpaceRequest(address_space_id=space)
    assert host.notifier.ReleaseAddressSpace(released, timeout=BOUND).result.verdict == PB.VERDICT_QUIESCED
    device.leave()


def a_refusal_names_its_reason_and_the_session_goes_on(host, threads):
    device = host.device("python5")
    space = mapped(host, 1)
    assert refused(lambda: device.subscribe(space + 1000, START, START + PAGE)) == "ADDRESS_SPACE_UNKNOWN"
    assert refused(lambda: device.fault(space, START, START + PAGE, PB.ACCESS_READ)) == "FAULT_NOT_SUBSCRIBED"
    device.subscribe(space, START, START + 2 * PAGE)
    assert refused(lambda: device.fault(space, START + PAGE, START + 2 * PAGE, PB.ACCESS_READ)) == "FAULT_UNMAPPED"
    assert len(device.fault(space, START, START + PAGE, PB.ACCESS_READ).translations) == 1
    device.leave()


def a_device_that_keeps_no_lease_gets_no_memory_that_is_strict(host, threads):
    hello = PB.Hello(device_id="python6", incarnation=1, protocol_versions=[1])
    ask = PB.Subscribe(request_id=1, address_space_id=mapped(host, 1))
    ask.ranges.add(start=START, end=START + PAGE)
    says = iter([PB.SessionRequest(hello=hello), PB.SessionRequest(subscribe=ask)])
    stream = SERVICES.DeviceServiceStub(host.devices).Session(says)
    assert next(stream).WhichOneof("message") == "welcome"
    error = next(stream).error
    assert not error.fatal and reason(error) == "LEASE_REQUIRED" and error.request_id == 1, error
    hello.protocol_versions[:] = [7, 9]
    error = only_answer(host, hello)
    assert reason(error) == "VERSION_UNSUPPORTED" and list(error.supported_versions) == [1], error


def a_device_whose_host_agent_falls_silent_fails_closed(host, threads):
    silent = Host(host.process.args[0], host.folder / "silent", lease="1s")
    try:
        device = silent.device("python7")
        space = mapped(silent, 1)
        device.subscribe(space, START, START + PAGE)
        device.fault(space, START, START + PAGE, PB.ACCESS_READ)
        assert device.read(space, START, 1) == b"\0"
        silent.process.send_signal(signal.SIGSTOP)
        device.keeper.join(BOUND)
        assert not device.keeper.is_alive() and now() >= device.lease_ends, "the lease never ends"
        try:
            device.read(space, START, 1)
            raise AssertionError("it reads without a lease")
        except SessionLost:
            pass
        assert not device.tlb
    finally:
        silent.process.send_signal(signal.SIGCONT)
        silent.stop()


def a_message_that_is_refused_leaves_the_session_alone(host, threads):
    device = host.device("python8")
    space = mapped(host, 1)
    device.subscribe(space, START, START + PAGE)
    assert refused(lambda: device.fault(space, START + 1, START + PAGE, PB.ACCESS_READ)) == "RANGE_INVALID"
    # Refused with no request that could be named: nobody waits for that answer.
    device._send(young=PB.Young(address_space_id=space + 1000, ranges=[pages(0, 1)]))
    assert len(device.fault(space, START, START + PAGE, PB.ACCESS_READ).translations) == 1
    assert device.lost is None
    device.leave()


def whatever_a_device_may_have_used_is_young(host, threads):
    """It does not count accesses, so that after each notice the whole range counts as used."""
    device = host.device("python9")
    space = host.notifier.RegisterAddressSpace(PB.RegisterAddressSpaceRequest(name="young")).address_space_id
    subscription = device.subscribe(space, START, START + 2 * PAGE)
    area = dict(address_space_id=space, range=pages(0, 1))

    def is_young():
        return host.notifier.TestYoung(PB.TestYoungRequest(**area)).young

    assert not is_young()
    start = PB.InvalidateRangeStartRequest(cause=PB.CAUSE_PROTECTION_VMA, **area)
    result = host.notifier.InvalidateRangeStart(start, timeout=BOUND).result
    host.notifier.InvalidateRangeEnd(PB.InvalidateRangeEndRequest(address_space_id=space, seq=result.seq))
    assert is_young()
    assert host.notifier.ClearFlushYoung(PB.ClearFlushYoungRequest(**area), timeout=BOUND).young
    device.unsubscribe(subscription)
    assert is_young()
    device.leave()


def a_flush_of_everything_is_told_as_young_of_everything(host, threads):
    # One notice at a time, and one range behind it: more than that is a FlushAll.
    narrow = Host(host.process.args[0], host.folder / "narrow", more=["--window=1", "--max-pending=1"])
    try:
        kinds, held = [], HeldAck()

        def note(notice):
            kinds.append(notice.address_space_id)
            held(notice)

        device = narrow.device("python10", note)
        request = PB.RegisterAddressSpaceRequest(name="narrow")
        space = narrow.notifier.RegisterAddressSpace(request).address_space_id
        device.subscribe(space, START, START + 100 * PAGE)
        for page in (0, 10, 20, 30):
            start = dict(address_space_id=space, range=pages(page, page + 1), cause=PB.CAUSE_CLEAR)
            start = PB.InvalidateRangeStartRequest(deadline_ms=0, **start)
            result = narrow.notifier.InvalidateRangeStart(start).result
            assert result.verdict == PB.VERDICT_NOT_QUIESCED
        held.go.set()
        wait = PB.AwaitRoundRequest(address_space_id=space, seq=result.seq)
        assert narrow.notifier.AwaitRound(wait, timeout=BOUND).result.verdict == PB.VERDICT_QUIESCED
        assert kinds == [space, 0], kinds
        young = PB.TestYoungRequest(address_space_id=space, range=pages(90, 91))
        assert narrow.notifier.TestYoung(young).young, "it was subscribed, so it may have been used"
        device.leave()
    finally:
        narrow.stop()


def a_source_in_another_language_serves_faults_and_moves_its_pages(host, threads):
    held = HeldAck()
    device = host.device("python11", held)
    source = Source(host.notifier, PB, "vmm")
    source.table = {START: 100, START + PAGE: 101}
    device.subscribe(source.space, START, START + 16 * PAGE)
    grant = device.fault(source.space, START, START + 2 * PAGE, PB.ACCESS_WRITE)
    assert [(t.range, t.frame) for t in grant.translations] == [(pages(0, 1), 100), (pages(1, 2), 101)], grant
    assert refused(lambda: device.fault(source.space, START, START + 3 * PAGE, PB.ACCESS_READ)) == "FAULT_UNMAPPED"

    # It loses patience with its call, more than once, and tries again: the round is the same one.
    moving = threads.submit(source.move, START, 200)
    assert held.flushed.wait(BOUND), "no notice came"
    fault = threads.submit(device.fault, source.space, START, START + PAGE, PB.ACCESS_READ)
    deadline = time.monotonic() + BOUND
    while source.tries < 3 and time.monotonic() < deadline:
        concurrent.futures.wait([moving], timeout=source.PATIENCE)
    assert source.tries >= 3 and not moving.done(), "the device has not acked"
    held.go.set()
    assert moving.result(BOUND).seq == 1
    assert device.last_notice == 1, "a retry is not another invalidation"
    assert fault.result(BOUND).translations[0].frame == 200, "a page was granted where it had been"

    source.stop_serving()
    assert refused(lambda: device.fault(source.space, START, START + PAGE, PB.ACCESS_READ)) == "FAULT_NOT_SERVED"
    release = PB.ReleaseAddressSpaceRequest(address_space_id=source.space, request_id="bye")
    for _ in range(2):
        assert host.notifier.ReleaseAddressSpace(release, timeout=BOUND).result.seq == 2
    device.leave()


def only_answer(host, hello):
    """The one message that a refused Hello is answered with."""
    stream = SERVICES.DeviceServiceStub(host.devices).Session(iter([PB.SessionRequest(hello=hello)]))
    return next(stream).error


def reason(error):
    return PB.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")


def refused(ask):
    try:
        ask()
    except Refused as refusal:
        return reason(refusal.error)
    raise AssertionError("it was not refused")


TESTS = (
    unmap_waits_for_a_device_in_another_language,
    a_fault_during_an_invalidation_gets_the_page_that_comes_after_it,
    nothing_is_waited_for_after_unsubscribed,
    leave_stands_for_an_ack_of_everything,
    a_source_in_another_language_is_told_who_is_missing,
    a_refusal_names_its_reason_and_the_session_goes_on,
    a_device_that_keeps_no_lease_gets_no_memory_that_is_strict,
    a_device_whose_host_agent_falls_silent_fails_closed,
    a_message_that_is_refused_leaves_the_session_alone,
    whatever_a_device_may_have_used_is_young,
    a_flush_of_everything_is_told_as_young_of_everything,
    a_source_in_another_language_serves_faults_and_moves_its_pages,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--daemon", required=True, type=pathlib.Path, help="the shootdownd to test")
    daemon = parser.parse_args().daemon.resolve()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="shootdown-python-") as folder:
        host = Host(daemon, pathlib.Path(folder) / "host")
        try:
            with concurrent.futures.ThreadPoolExecutor() as threads:
                for test in TESTS:
                    try:
                        test(host, threads)
                        print(f"ok      {test.__name__}", flush=True)
                    except Exception:
                        failed += 1
                        print(f"FAILED  {test.__name__}", flush=True)
                        traceback.print_exc()
        finally:
            code = host.stop()
    if code != 0:
        failed += 1
        print(f"FAILED  shootdownd stops when it is told to: it exited with {code}")
    print(f"{len(TESTS) + 1 - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
