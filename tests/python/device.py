"""A device in another language: all that docs/protocol.md asks of one.

docs/protocol.md shows the part between the marks as it stands here; a test keeps the two in step.
"""

import queue
import threading
import time


class SessionLost(Exception):
    """There is no session any more; the device holds nothing."""


class Refused(Exception):
    """The host agent refused a request; the session goes on."""

    def __init__(self, error):
        super().__init__(error.message)
        self.error = error


def now():
    """Seconds on a clock that goes on while the machine is suspended, as a lease does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Device:
    """Works through its stream in order, on one thread.

    `device` and `pages` are the two stubs, `pb` the messages. `before_ack` is called with each notice
    after its flush and before its ack.
    """

    # How wrong its clock may be, and its longest access after a look at the lease, in seconds.
    DRIFT, MARGIN = 600e-6, 0.1

    def __init__(self, device, pages, pb, name, before_ack=lambda notice: None):
        self.pb, self.pages, self.before_ack = pb, pages, before_ack
        self.tlb = {}  # (address space, first address of the page) -> Translation
        self.subscriptions = {}  # subscription id -> (address space, start, end)
        self.lease_ends = 0.0
        self.last_notice = 0
        self.lost = None
        self._using = threading.RLock()  # held by each access, and by whatever takes translations away
        self._asking = threading.Lock()
        self._asked = {}  # request id -> (when it was asked, where its answer goes)
        self._last_request = 0
        self._to_send = queue.SimpleQueue()
        hello = pb.Hello(device_id=name, incarnation=time.time_ns(), protocol_versions=[1])
        hello.capabilities.enforces_lease = True
        asked = now()  # before it is sent: that can only make the lease shorter
        self._send(hello=hello)
        self._stream = device.Session(iter(self._to_send.get, None))
        first = next(self._stream)
        if first.WhichOneof("message") != "welcome":
            raise SessionLost(first.error.message)
        self.welcome = first.welcome
        self._on_lease(asked, first.welcome.lease_ms)
        self._reader = threading.Thread(target=self._run, daemon=True)
        self._reader.start()
        self.keeper = threading.Thread(target=self._keep_lease, daemon=True)
        self.keeper.start()

    def subscribe(self, address_space, start, end):
        ranges = [self.pb.AddressRange(start=start, end=end)]
        ask = self.pb.Subscribe(address_space_id=address_space, ranges=ranges)
        subscription = self._ask("subscribe", ask).subscription_id
        self.subscriptions[subscription] = (address_space, start, end)
        return subscription

    def unsubscribe(self, subscription):
        # Flushed before it is asked: from the answer on, nothing that happens to the range is told.
        with self._using:
            area = self.subscriptions.pop(subscription)
            self._drop(*area)
        self._say_young([area])
        self._ask("unsubscribe", self.pb.Unsubscribe(subscription_id=subscription))

    def fault(self, address_space, start, end, access):
        area = self.pb.AddressRange(start=start, end=end)
        return self._ask("fault", self.pb.Fault(address_space_id=address_space, range=area, access=access))

    def read(self, address_space, address, length):
        """Reads memory of the host. Holds the lock for the whole access, so that a flush waits for it."""
        with self._using:
            if now() >= self.lease_ends:
                raise SessionLost("no lease, no access")
            frame = self.tlb[address_space, address & ~0xFFF].frame
            return self.read_frame(frame, address & 0xFFF, length)

    def read_frame(self, frame, offset, length):
        """What the hardware could do: reads a frame whatever the TLB says."""
        span = self.pb.FrameSpan(frame=frame, offset=offset, length=length)
        session, epoch = self.welcome.session_id, self.welcome.epoch
        return self.pages.Read(self.pb.ReadRequest(session_id=session, epoch=epoch, spans=[span])).data

    def leave(self):
        with self._using:
            self.tlb.clear()
        self._say_young(self.subscriptions.values())
        self._send(leave=self.pb.Leave())
        self._to_send.put(None)
        self._reader.join(10)

    # shown in docs/protocol.md: begin
    def _apply(self, said):
        """One message of the host agent, in the order of the stream."""
        kind = said.WhichOneof("message")
        if kind == "grant":
            self._on_grant(said.grant)
        elif kind == "notices":
            for notice in said.notices.notices:
                self._on_notice(notice)
        elif kind == "lease_renewed":
            asked, _ = self._answered(said.lease_renewed.request_id)
            self._on_lease(asked, said.lease_renewed.lease_ms)
        elif kind == "error" and said.error.fatal:
            raise SessionLost(said.error.message)
        elif kind in ("subscribed", "unsubscribed", "error"):
            self._answer(getattr(said, kind))  # an error that names no request is nobody's answer
        elif kind != "drain":
            raise SessionLost("a message that this device does not know may be one that it must act on")

    def _on_grant(self, grant):
        # It is true where it stands in the stream: what takes it away comes after it.
        with self._using:
            for translation in grant.translations:
                page = translation.range.start
                if self._is_subscribed(grant.address_space_id, page):  # else Unsubscribe overtook it
                    self.tlb[grant.address_space_id, page] = translation
        self._answer(grant)

    def _on_notice(self, notice):
        if notice.number != self.last_notice + 1:
            raise SessionLost(f"notice {notice.number} after {self.last_notice}")
        self.last_notice = notice.number
        ack = self.pb.Ack(session_id=self.welcome.session_id, through=notice.number)
        if notice.kind not in (self.pb.NOTICE_KIND_CLEAR_YOUNG, self.pb.NOTICE_KIND_RANGE_END):
            # A kind that it does not know is an invalidation like the others.
            with self._using:  # had when no access is going on
                self._flush(notice)
        # It does not count its accesses, so it says too much and never too little. It writes nothing.
        if notice.address_space_id == 0:  # FlushAll: a report would not say of which address space
            self._say_young(self.subscriptions.values())
        elif notice.kind not in (self.pb.NOTICE_KIND_RANGE_END, self.pb.NOTICE_KIND_RELEASE):
            ack.reports.add(notice=notice.number, young=[notice.range])
        self.before_ack(notice)
        self._send(ack=ack)

    def _flush(self, notice):
        if notice.address_space_id == 0:  # FlushAll
            self.tlb.clear()
        elif notice.kind == self.pb.NOTICE_KIND_RELEASE:  # its subscriptions end with it
            self._drop(notice.address_space_id, 0, 0)
            for subscription, (space, _, _) in list(self.subscriptions.items()):
                if space == notice.address_space_id:
                    self.subscriptions.pop(subscription, None)
        elif notice.range.all:
            self._drop(notice.address_space_id, 0, 0)
        else:
            self._drop(notice.address_space_id, notice.range.start, notice.range.end)

    def _drop(self, address_space, start, end):
        for space, page in list(self.tlb):
            if space == address_space and start <= page and (page < end or end == 0):
                del self.tlb[space, page]

    def _say_young(self, areas):
        for address_space, start, end in list(areas):
            ranges = [self.pb.AddressRange(start=start, end=end)]
            self._send(young=self.pb.Young(address_space_id=address_space, ranges=ranges))

    def _on_lease(self, asked, lease_ms):
        lease = lease_ms / 1000
        self.lease_ends = max(self.lease_ends, asked + lease - lease * self.DRIFT - self.MARGIN)

    def _keep_lease(self):
        while self.lost is None and now() < self.lease_ends:
            self._request("heartbeat", self.pb.Heartbeat(), None)
            self._reader.join(self.welcome.lease_ms / 3000)  # three a lease
        with self._using:
            self.tlb.clear()

    # shown in docs/protocol.md: end

    def _run(self):
        lost = SessionLost("the host agent closed the stream")
        try:
            for said in self._stream:
                self._apply(said)
        except Exception as error:  # the stream broke, or a flush failed: nothing is acked by that
            lost = error
        self.lease_ends = 0.0
        with self._using:
            self.tlb.clear()
        with self._asking:
            self.lost = lost
            waiting, self._asked = self._asked, {}
        self._to_send.put(None)
        for _, waiter in waiting.values():
            if waiter is not None:
                waiter.put(None)

    def _is_subscribed(self, address_space, page):
        return any(
            space == address_space and start <= page and (page < end or end == 0)
            for space, start, end in list(self.subscriptions.values())
        )

    def _ask(self, field, message):
        waiter = queue.SimpleQueue()
        self._request(field, message, waiter)
        answer = waiter.get()
        if answer is None:
            raise SessionLost(str(self.lost))
        if isinstance(answer, self.pb.Error):
            raise Refused(answer)
        return answer

    def _request(self, field, message, waiter):
        with self._asking:
            if self.lost is not None:
                raise SessionLost(str(self.lost))
            self._last_request += 1
            message.request_id = self._last_request
            self._asked[message.request_id] = (now(), waiter)
        self._send(**{field: message})

    def _answered(self, request_id):
        with self._asking:
            return self._asked.pop(request_id, (0.0, None))

    def _answer(self, said):
        _, waiter = self._answered(said.request_id)
        if waiter is not None:
            waiter.put(said)

    def _send(self, **message):
        self._to_send.put(self.pb.SessionRequest(**message))
