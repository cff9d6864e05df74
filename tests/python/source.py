"""A source, from the .proto files alone: a program whose page table answers its devices' faults."""

import queue
import threading
import uuid

import grpc

PAGE = 4096


# Nobody knows whether the call arrived. A deadline that passes is CANCELLED where the host agent notices first.
UNDECIDED = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


class Source:
    """A program with an address space of its own. A page moves only when no device uses it any more."""

    # Who gets no answer for so long tries again, with the same id: the call is done once however often.
    PATIENCE = 0.1

    def __init__(self, notifier, pb, name):
        self.notifier, self.pb = notifier, pb
        request = pb.RegisterAddressSpaceRequest(name=name)
        self.space = notifier.RegisterAddressSpace(request).address_space_id
        self.table = {}  # page -> frame
        self._changing = threading.Lock()
        self.tries = 0  # calls that were sent, retries too
        self.host = 0  # the highest run of the host agent that has answered
        self._answers = queue.SimpleQueue()
        self._answers.put(pb.ServeFaultsRequest(open=pb.ServeFaultsOpen(address_space_id=self.space)))
        self._stream = notifier.ServeFaults(iter(self._answers.get, None))
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()

    def move(self, page, frame):
        """Gives a page another frame; the old one is free when this returns."""
        area = self.pb.AddressRange(start=page, end=page + PAGE)
        start = dict(address_space_id=self.space, range=area, cause=self.pb.CAUSE_MIGRATE)
        started = self._call(self.notifier.InvalidateRangeStart, self.pb.InvalidateRangeStartRequest(**start))
        result = started.result
        if result.host_incarnation < self.host:
            raise RuntimeError("the answer of a host agent that was stopped while its successor ran")
        self.host = result.host_incarnation
        assert result.verdict == self.pb.VERDICT_QUIESCED, result
        with self._changing:
            self.table[page] = frame
        end = self.pb.InvalidateRangeEndRequest(
            address_space_id=self.space, seq=result.seq, host_incarnation=result.host_incarnation
        )
        self._call(self.notifier.InvalidateRangeEnd, end)
        return result

    def stop_serving(self):
        self._answers.put(None)
        self._serving.join(10)

    def _call(self, method, request):
        request.request_id = str(uuid.uuid4())
        while True:
            self.tries += 1
            try:
                return method(request, timeout=self.PATIENCE)
            except grpc.RpcError as error:
                # It does not matter: the id says which call it is.
                if error.code() not in UNDECIDED:
                    raise

    def _serve(self):
        for said in self._stream:
            self._answers.put(self._answer(said.asked))

    def _answer(self, asked):
        # It need not look whether one of its own invalidations is going on: that is the host agent's part.
        answer = self.pb.FaultTranslated(fault_id=asked.fault_id)
        for page in range(asked.range.start, asked.range.end, PAGE):
            with self._changing:
                frame = self.table.get(page)
            if frame is None:
                reason = self.pb.ERROR_REASON_FAULT_UNMAPPED
                declined = self.pb.FaultDeclined(fault_id=asked.fault_id, reason=reason, address=page)
                return self.pb.ServeFaultsRequest(declined=declined)
            area = self.pb.AddressRange(start=page, end=page + PAGE)
            answer.translations.add(range=area, frame=frame, access=self.pb.ACCESS_WRITE)
        return self.pb.ServeFaultsRequest(translated=answer)
