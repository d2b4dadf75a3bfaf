#!/usr/bin/python3
"""Checks an NBD server from outside: every command, legal and illegal.

    nbd_protocol.py URI

URI names a writable export of at least 64 MiB, whose first 64 MiB are overwritten. Well-formed clients
are played by libnbd (Debian: python3-libnbd), broken ones by raw sockets. Prints what was checked; the
first failure ends the run with one sentence and exit code 1.

After each illegal thing the server must still serve: that is checked by a second connection that stays
open from beginning to end.
"""

import errno
import random
import socket
import struct
import sys
import urllib.parse

try:
    import nbd
except ImportError:
    # Debian installs it for its own interpreter, which another python3 in PATH may hide.
    sys.exit("FAILED: this python has no module 'nbd': install python3-libnbd and use /usr/bin/python3")

MIB = 1 << 20
PAYLOAD_MAX = 32 * MIB
AREA = 64 * MIB

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
GO, STRUCTURED, EXTENDED, SET_CONTEXT = 7, 8, 11, 10
ACK = 1
PAYLOAD_LEN = 32


class Failure(Exception):
    pass


def expect(condition, sentence):
    if not condition:
        raise Failure(sentence)


def section(name):
    print(f"ok  {name}", flush=True)


class Raw:
    """A client without scruples, and without libnbd's help."""

    def __init__(self, uri):
        parts = urllib.parse.urlparse(uri)
        query = urllib.parse.parse_qs(parts.query)
        self.name = urllib.parse.unquote(parts.path).lstrip("/")
        if "socket" in query:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(60)
            self.socket.connect(query["socket"][0])
        else:
            address = (parts.hostname or "localhost", parts.port or 10809)
            self.socket = socket.create_connection(address, timeout=60)
        self.extended = False

    def send(self, data):
        self.socket.sendall(data)

    def receive(self, length):
        data = b""
        while len(data) < length:
            now = self.socket.recv(length - len(data))
            if not now:
                raise EOFError
            data += now
        return data

    def closed(self):
        """True if the server closes the connection (whatever it says before)."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        except socket.timeout:
            return False
        return True

    def greet(self, flags=3):
        expect(self.receive(16) == b"NBDMAGICIHAVEOPT", "the server greets with the magics of newstyle")
        (handshake,) = struct.unpack(">H", self.receive(2))
        expect(handshake & 3 == 3, "the server offers fixed newstyle and no zeroes")
        self.send(struct.pack(">I", flags))

    def option(self, option, data=b""):
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.receive(20))
            expect(magic == 0x3E889045565A9 and echoed == option, "a reply to an option names it")
            payload = self.receive(length)
            if kind == ACK or kind >> 31:
                return kind, payload

    def name_data(self):
        name = self.name.encode()
        return struct.pack(">I", len(name)) + name

    def go(self, structured=False, extended=False, context=False):
        self.greet()
        if structured:
            expect(self.option(STRUCTURED)[0] == ACK, "structured replies are accepted")
        if extended:
            expect(self.option(EXTENDED)[0] == ACK, "extended headers are accepted")
        if context:
            query = b"base:allocation"
            data = self.name_data() + struct.pack(">II", 1, len(query)) + query
            expect(self.option(SET_CONTEXT, data)[0] == ACK, "base:allocation can be selected")
        expect(self.option(GO, self.name_data() + b"\0\0")[0] == ACK, f"GO to '{self.name}' is acknowledged")
        self.extended = extended
        return self

    def header(self, command, offset, length, flags=0, cookie=1):
        if self.extended:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)

    def request(self, *arguments, payload=b"", **named):
        self.send(self.header(*arguments, **named) + payload)

    def simple(self):
        """A simple reply: (error, cookie)."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        expect(magic == 0x67446698, "without structured replies, replies are simple")
        return error, cookie

    def chunk(self):
        """An extended chunk: (last, type, cookie, payload)."""
        magic, flags, kind, cookie, _, length = struct.unpack(">IHHQQQ", self.receive(32))
        expect(magic == 0x6E8A278C, "with extended headers, every reply is an extended chunk")
        return flags & 1, kind, cookie, self.receive(length)

    def extended_error(self):
        """The error of an extended reply, 0 for success."""
        last, kind, _, payload = self.chunk()
        expect(last, "a reply without data has one chunk")
        return struct.unpack(">I", payload[:4])[0] if kind == 0x8001 else 0


class Checks:
    def __init__(self, uri):
        self.uri = uri
        self.witness = nbd.NBD()
        self.witness.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        self.witness.connect_uri(uri)
        self.size = self.witness.get_size()
        expect(self.size >= AREA, f"the export has {self.size} bytes, the check needs {AREA}")
        expect(not self.witness.is_read_only(), "the export must be writable")
        self.random = random.Random(7)

    def bytes(self, length):
        return self.random.randbytes(length)

    def connect(self, **settings):
        handle = nbd.NBD()
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        for name, value in settings.items():
            getattr(handle, name)(value)
        handle.connect_uri(self.uri)
        return handle

    def raw(self, **modes):
        return Raw(self.uri).go(**modes)

    def alive(self, after):
        """Somebody else's connection, and a new one, still work."""
        data = self.bytes(4096)
        try:
            self.witness.pwrite(data, AREA - 4096)
            expect(self.witness.pread(4096, AREA - 4096) == data, f"another connection reads what it wrote after {after}")
            raw = self.raw()
            raw.request(READ, AREA - 4096, 4096)
            expect(raw.simple()[0] == 0 and raw.receive(4096) == data, f"a new connection reads after {after}")
            raw.request(DISC, 0, 0)
        except (nbd.Error, EOFError, OSError) as error:
            raise Failure(f"after {after} the server serves nobody else: {error}") from error

    def fails(self, number, what, call):
        """`call` must fail with that errno; the connection must survive."""
        try:
            call()
        except nbd.Error as error:
            expect(error.errnum == number, f"{what} fails with {errno.errorcode[number]}, not with {error}")
            return
        raise Failure(f"{what} succeeded, it must fail with {errno.errorcode[number]}")

    # ------------------------------------------------------------ legal

    def flags(self):
        h = self.witness
        for what in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_cache", "can_df",
                     "can_multi_conn"):
            expect(getattr(h, what)(), f"the server announces {what}")
        expect(h.get_structured_replies_negotiated(), "structured replies are negotiated")
        expect(h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), "base:allocation is offered")
        sizes = [h.get_block_size(n) for n in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
        expect(sizes == [1, 4096, PAYLOAD_MAX], f"block sizes are 1, 4096 and 32 MiB, not {sizes}")
        section("flags and block sizes")

    def options(self):
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_uri(self.uri)
        names = []
        h.opt_list(lambda name, description: names.append(name) and 0)
        name = Raw(self.uri).name
        expect(names and (not name or name in names), f"LIST names the export '{name}', it says {names}")
        h.set_export_name(name)
        h.opt_info()
        expect(h.get_size() == self.size, "INFO tells the size")
        contexts = []
        h.opt_list_meta_context(lambda context: contexts.append(context) and 0)
        expect(contexts == ["base:allocation"], f"LIST_META_CONTEXT says base:allocation, not {contexts}")
        h.set_export_name("no such export")
        for option, call in (("INFO", h.opt_info), ("GO", h.opt_go)):
            try:
                call()
            except nbd.Error as error:
                expect(error.errnum == errno.ENOENT, f"{option} of an unknown export fails with ENOENT, not {error}")
            else:
                raise Failure(f"{option} of an unknown export succeeded")
        h.set_export_name(name)
        h.opt_go()
        expect(h.get_size() == self.size, "after a refused GO another export can be chosen")
        h.shutdown()
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(self.uri)
        h.opt_abort()
        section("LIST, INFO, GO, LIST_META_CONTEXT, unknown export, ABORT")

    def default_export(self):
        raw = Raw(self.uri)
        raw.name = ""
        raw.go()
        raw.request(READ, 0, 512)
        expect(raw.simple()[0] == 0, "the empty name opens a default export")
        section("default export")

    def legacy(self):
        for flags, zeroes in ((1, 124), (3, 0)):
            raw = Raw(self.uri)
            raw.greet(flags)
            name = raw.name.encode()
            raw.send(b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
            size, _ = struct.unpack(">QH", raw.receive(10 + zeroes)[:10])
            expect(size == self.size, "EXPORT_NAME tells the size")
            raw.request(READ, 0, 512)
            expect(raw.simple() == (0, 1), "after EXPORT_NAME a read is answered")
            raw.receive(512)
        section("EXPORT_NAME, with and without zeroes")

    def read_write(self):
        for structured in (True, False):
            h = self.connect(set_request_structured_replies=structured)
            for length in (1, 511, 512, 4095, 4096, 4097, 65536, 131073, MIB, 5 * MIB + 3, PAYLOAD_MAX):
                offset = self.random.randrange(AREA - length)
                data = self.bytes(length)
                h.pwrite(data, offset)
                expect(h.pread(length, offset) == data, f"{length} bytes at {offset} come back as written")
            data = self.bytes(4096)
            h.pwrite(data, 8192, nbd.CMD_FLAG_FUA)
            h.flush()
            expect(self.witness.pread(4096, 8192) == data, "another connection sees a flushed write")
            h.shutdown()
        section("READ and WRITE from 1 byte to 32 MiB, FUA, FLUSH, with and without structured replies")

    def zero_trim_cache(self):
        h = self.connect()
        model = bytearray(self.bytes(2 * MIB))
        h.pwrite(bytes(model), MIB)
        for flags in (0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO):
            for length in (1, 4096, 70_000, 300_001):
                offset = self.random.randrange(len(model) - length)
                try:
                    h.zero(length, MIB + offset, flags)
                    model[offset:offset + length] = bytes(length)
                except nbd.Error as error:
                    quick = flags == nbd.CMD_FLAG_FAST_ZERO and error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP)
                    expect(quick, f"WRITE_ZEROES with flags {flags} of {length} bytes failed: {error}")
                expect(h.pread(len(model), MIB) == model, f"WRITE_ZEROES of {length} bytes zeroes these and no others")
        before = bytes(model)
        h.trim(500_001, MIB + 100_001)
        after = h.pread(len(model), MIB)
        for at, (old, new) in enumerate(zip(before, after)):
            inside = 100_001 <= at < 600_002
            expect(new == old or (inside and new == 0), f"TRIM changed byte {at} from {old} to {new}")
        h.trim(65536, MIB, nbd.CMD_FLAG_FUA)
        h.cache(MIB, MIB)
        h.zero(AREA - MIB, 0)
        expect(h.pread(PAYLOAD_MAX, 0) == bytes(PAYLOAD_MAX), "WRITE_ZEROES of 63 MiB zeroes")
        h.shutdown()
        section("WRITE_ZEROES with FUA, NO_HOLE and FAST_ZERO, TRIM, CACHE")

    def extents_of(self, h, offset, length, flags=0):
        found = []
        h.block_status(length, offset, lambda name, start, entries, error: found.extend(entries) and 0, flags)
        return list(zip(found[::2], found[1::2]))

    def block_status(self):
        h = self.connect()
        h.trim(16 * MIB, 0)
        h.zero(16 * MIB, 0)
        h.pwrite(self.bytes(MIB), 8 * MIB)
        extents, at = {}, 0
        while at < 16 * MIB:
            entries = self.extents_of(h, at, 16 * MIB - at)
            expect(entries, "BLOCK_STATUS makes progress")
            for length, status in entries:
                extents[at] = (length, status)
                at += length
        for start, (length, status) in extents.items():
            if status & nbd.STATE_ZERO:
                expect(not any(h.pread(length, start)), f"what BLOCK_STATUS calls zero at {start} reads as zero")
        data = sum(length for length, status in extents.values() if status == 0)
        expect(data >= MIB, "BLOCK_STATUS calls written bytes data")
        one = self.extents_of(h, 8 * MIB + 4096, MIB, nbd.CMD_FLAG_REQ_ONE)
        expect(len(one) == 1 and one[0][0] <= MIB and one[0][1] == 0, f"REQ_ONE gives one extent within the range: {one}")
        section(f"BLOCK_STATUS, REQ_ONE ({data // 1024} KiB of 16 MiB are data)")

    def structured_read(self):
        h = self.connect()
        h.zero(MIB, 0)
        data = self.bytes(65536)
        h.pwrite(data, 131072)
        expected = bytes(131072) + data + bytes(MIB - 196608)
        for flags in (0, nbd.CMD_FLAG_DF):
            chunks = []
            buffer = h.pread_structured(
                MIB, 0, lambda part, offset, status, error: chunks.append((offset, len(part), status)) and 0, flags)
            expect(buffer == expected, "a structured read gives the right bytes")
            covered = sum(length for _, length, _ in chunks)
            expect(covered == MIB, f"the chunks of a structured read cover it once, not {covered} bytes")
            if flags:
                expect(len(chunks) == 1, f"with DF a read comes in one chunk, not {len(chunks)}")
        section("structured reads, holes, DF")

    def many_in_flight(self):
        h = self.connect()
        pieces = [(n * 65536, self.bytes(self.random.choice([512, 4096, 20_000, 65536]))) for n in range(256)]
        cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at) for at, data in pieces]
        self.finish(h, cookies)
        buffers = [nbd.Buffer(len(data)) for _, data in pieces]
        cookies = [h.aio_pread(buffer, at) for buffer, (at, _) in zip(buffers, pieces)]
        self.finish(h, cookies)
        for buffer, (at, data) in zip(buffers, pieces):
            expect(buffer.to_bytearray() == data, f"256 requests in flight: the right bytes at {at}")
        big = [(n * PAYLOAD_MAX // 4, self.bytes(PAYLOAD_MAX // 4)) for n in range(7)]
        cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at) for at, data in big]
        self.finish(h, cookies)
        buffers = [nbd.Buffer(len(data)) for _, data in big]
        cookies = [h.aio_pread(buffer, at) for buffer, (at, _) in zip(buffers, big)]
        self.finish(h, cookies)
        for buffer, (at, data) in zip(buffers, big):
            expect(buffer.to_bytearray() == data, f"7 requests of 8 MiB in flight: the right bytes at {at}")
        section("256 requests in flight, 56 MiB in flight")

    def finish(self, h, cookies):
        waiting = set(cookies)
        while waiting:
            h.poll(-1)
            waiting = {cookie for cookie in waiting if not h.aio_command_completed(cookie)}

    def multi_conn(self):
        handles = [self.connect() for _ in range(4)]
        for n, h in enumerate(handles):
            h.pwrite(bytes([n + 1]) * 4096, n * 4096)
        handles[0].flush()
        expected = b"".join(bytes([n + 1]) * 4096 for n in range(4))
        for h in handles:
            expect(h.pread(16384, 0) == expected, "each connection sees the flushed writes of the others")
            h.shutdown()
        section("four connections to one export")

    def extended_headers(self):
        raw = self.raw(extended=True, context=True)
        data = self.bytes(8192)
        raw.request(WRITE, 4096, 8192, flags=PAYLOAD_LEN, payload=data)
        expect(raw.extended_error() == 0, "an extended WRITE succeeds")
        raw.request(READ, 4096, 8192)
        last, kind, cookie, payload = raw.chunk()
        expect((kind, cookie) == (1, 1) and payload[8:] == data, "an extended READ gives the bytes")
        expect(last, "an extended READ of data ends with its chunk")
        raw.request(ZEROES, 4096, 4096)
        expect(raw.extended_error() == 0, "an extended WRITE_ZEROES succeeds")
        raw.request(CACHE, 0, self.size)
        expect(raw.extended_error() == 0, "an extended CACHE of the whole export succeeds")
        raw.request(STATUS, 0, self.size)
        last, kind, _, payload = raw.chunk()
        context, count = struct.unpack(">II", payload[:8])
        expect(kind == 6 and last and count >= 1, "an extended BLOCK_STATUS gives extents of 64 bits")
        total = sum(struct.unpack(">QQ", payload[8 + 16 * n:24 + 16 * n])[0] for n in range(count))
        expect(0 < total <= self.size, f"these extents lie within the export: {total}")
        raw.request(FLUSH, 0, 0)
        expect(raw.extended_error() == 0, "an extended FLUSH succeeds")
        for what, number, request in (
                ("a READ beyond 2^63", errno.EINVAL, (READ, 1 << 63, 4096)),
                ("a READ of 2^40 bytes", errno.EINVAL, (READ, 0, 1 << 40)),
                ("a TRIM of 2^64 - 1 bytes", errno.EINVAL, (TRIM, 1, (1 << 64) - 1)),
                ("a WRITE_ZEROES of 2^64 - 1 bytes", errno.ENOSPC, (ZEROES, 4096, (1 << 64) - 1))):
            raw.request(*request)
            expect(raw.extended_error() == number, f"{what} fails with {errno.errorcode[number]}")
        raw.request(STATUS, 0, 16, flags=PAYLOAD_LEN, payload=bytes(16))
        expect(raw.extended_error() == errno.EINVAL, "a BLOCK_STATUS with a payload fails with EINVAL")
        raw.request(READ, 0, 512)
        expect(raw.chunk()[1] in (1, 2), "after them the connection goes on")
        section("extended headers")

    # ------------------------------------------------------------ illegal

    def illegal_requests(self):
        h = self.connect()
        h.set_strict_mode(0)
        size = self.size
        checks = (
            ("a READ beyond the end", errno.EINVAL, lambda: h.pread(512, size)),
            ("a READ across the end", errno.EINVAL, lambda: h.pread(4096, size - 512)),
            ("a READ of nothing", errno.EINVAL, lambda: h.pread(0, 0)),
            ("a WRITE beyond the end", errno.ENOSPC, lambda: h.pwrite(bytes(512), size)),
            ("a WRITE across the end", errno.ENOSPC, lambda: h.pwrite(bytes(4096), size - 512)),
            ("a WRITE at 2^63", errno.ENOSPC, lambda: h.pwrite(bytes(4096), 1 << 63)),
            ("a WRITE_ZEROES across the end", errno.ENOSPC, lambda: h.zero(4096, size - 512)),
            ("a TRIM beyond the end", errno.EINVAL, lambda: h.trim(4096, size)),
            ("a TRIM of nothing", errno.EINVAL, lambda: h.trim(0, 0)),
            ("a CACHE beyond the end", errno.EINVAL, lambda: h.cache(4096, size)),
            ("a BLOCK_STATUS beyond the end", errno.EINVAL, lambda: self.extents_of(h, size, 4096)),
            ("a BLOCK_STATUS of nothing", errno.EINVAL, lambda: self.extents_of(h, 0, 0)),
            ("a TRIM with DF", errno.EINVAL, lambda: h.trim(4096, 0, nbd.CMD_FLAG_DF)),
            ("a WRITE with NO_HOLE", errno.EINVAL, lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_NO_HOLE)),
        )
        for what, number, call in checks:
            self.fails(number, what, call)
            expect(len(h.pread(512, 0)) == 512, f"after {what} the same connection goes on")
        h.shutdown()
        section("beyond the end, bad lengths, bad flags")

    def illegal_raw_requests(self):
        raw = self.raw()
        for what, request in (
                ("an unknown command", (8, 0, 0)),
                ("command 65535", (65535, 0, 4096)),
                ("a READ of over 32 MiB", (READ, 0, PAYLOAD_MAX + 1)),
                ("a READ of 4 GiB - 1", (READ, 0, 0xFFFFFFFF)),
                ("a READ whose end overflows", (READ, (1 << 64) - 512, 4096)),
                ("a FLUSH with an offset", (FLUSH, 4096, 0)),
                ("a FLUSH with a length", (FLUSH, 0, 4096)),
                ("a BLOCK_STATUS without a context", (STATUS, 0, 4096))):
            raw.request(*request, cookie=0xFEED)
            expect(raw.simple() == (errno.EINVAL, 0xFEED), f"{what} fails with EINVAL")
        raw.request(READ, 0, 4096, flags=4)
        expect(raw.simple()[0] == errno.EINVAL, "DF without structured replies fails with EINVAL")
        raw.request(READ, 0, 4096, flags=0x8000)
        expect(raw.simple()[0] == errno.EINVAL, "an unknown flag fails with EINVAL")
        raw.request(WRITE, 0, PAYLOAD_MAX + 512, payload=bytes(PAYLOAD_MAX + 512))
        expect(raw.simple()[0] == errno.EINVAL, "a WRITE of over 32 MiB fails with EINVAL")
        raw.request(READ, 0, 512)
        expect(raw.simple()[0] == 0, "after all of them the same connection goes on")
        self.alive("illegal requests")
        section("unknown commands, lengths over 32 MiB, overflowing ranges, flags not negotiated")

    def broken_streams(self):
        marker = self.bytes(4096)
        self.witness.pwrite(marker, 0)
        raw = self.raw()
        raw.send(bytes(28))
        expect(raw.closed(), "a request with bad magic closes the connection")
        raw = self.raw()
        raw.send(struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(12))
        expect(raw.closed(), "a reply sent to the server closes the connection")
        raw = self.raw(extended=True)
        raw.extended = False
        raw.request(READ, 0, 512)
        raw.send(bytes(4))
        expect(raw.closed(), "a compact request after extended headers closes the connection")
        raw = self.raw()
        raw.request(WRITE, 0, 0xFFFFFFFF)
        expect(raw.closed(), "a WRITE of 4 GiB closes the connection")
        for what, sent in (("half a header", 13), ("a header without its payload", 28), ("half a payload", 28 + 2000)):
            raw = self.raw()
            raw.send((raw.header(WRITE, 0, 4096) + bytes(4096))[:sent])
            raw.socket.close()
            self.alive(what)
        raw = self.raw()
        raw.request(WRITE, 0, PAYLOAD_MAX, payload=bytes(5 * MIB))
        raw.socket.close()
        self.alive("part of a payload of 32 MiB")
        expect(self.witness.pread(4096, 0) == marker, "half a WRITE writes nothing")
        section("bad magic, half a header, half a payload")

    def broken_handshakes(self):
        raw = Raw(self.uri)
        raw.greet(0xFF)
        expect(raw.closed(), "unknown client flags close the connection")
        raw = Raw(self.uri)
        raw.greet()
        raw.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        expect(raw.closed(), "another protocol closes the connection")
        raw = Raw(self.uri)
        raw.greet()
        raw.send(b"IHAVEOPT" + struct.pack(">II", 1, 7) + b"nothere")
        expect(raw.closed(), "EXPORT_NAME of an unknown export closes the connection")
        raw = Raw(self.uri)
        raw.greet()
        raw.send(b"IHAVEOPT" + struct.pack(">II", GO, 0xFFFFFFFF))
        expect(raw.closed(), "an option of 4 GiB closes the connection")
        raw = Raw(self.uri)
        raw.greet()
        for what, option, data in (
                ("STARTTLS", 5, b""),
                ("an unknown option", 4711, b""),
                ("an unknown option with data", 4711, b"some data"),
                ("LIST with data", 3, b"x"),
                ("STRUCTURED_REPLY with data", STRUCTURED, b"x"),
                ("GO without data", GO, b""),
                ("GO with a name longer than its data", GO, b"\0\0\1\0vol0\0\0"),
                ("GO with trailing bytes", GO, raw.name_data() + b"\0\0xx"),
                ("GO with a name of 5000 bytes", GO, struct.pack(">I", 5000) + b"x" * 5000 + b"\0\0"),
                ("GO with a name that is not UTF-8", GO, b"\0\0\0\2\xff\xfe\0\0"),
                ("SET_META_CONTEXT without structured replies", SET_CONTEXT, raw.name_data() + bytes(4)),
                ("an option with 1 MiB of data", GO, bytes(MIB))):
            expect(raw.option(option, data)[0] >> 31, f"{what} is refused with an error")
        expect(raw.option(STRUCTURED)[0] == ACK, "after them STRUCTURED_REPLY is accepted")
        for what, data in (
                ("SET_META_CONTEXT with a false count", raw.name_data() + b"\xff\xff\xff\xff"),
                ("SET_META_CONTEXT with a query too short", raw.name_data() + b"\0\0\0\1\0\0\0\x50base:")):
            expect(raw.option(SET_CONTEXT, data)[0] >> 31, f"{what} is refused with an error")
        expect(raw.option(GO, raw.name_data() + b"\0\0")[0] == ACK, "after all of them GO is acknowledged")
        for sent in (0, 2, 4, 10, 20):
            raw = Raw(self.uri)
            raw.receive(18)
            raw.send((struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", GO, 100))[:sent])
            raw.socket.close()
        self.alive("broken handshakes")
        section("bad flags, unknown and malformed options, half a handshake")

    def garbage(self):
        for _ in range(100):
            raw = Raw(self.uri)
            raw.greet()
            raw.send(self.bytes(self.random.randrange(1, 2000)))
            raw.socket.close()
        for _ in range(100):
            raw = self.raw(structured=True)
            for _ in range(self.random.randrange(1, 5)):
                # Commands that change data are left out: what is being checked is that nothing breaks.
                command = self.random.choice([READ, FLUSH, CACHE, STATUS, 9])
                offset, length = self.random.getrandbits(self.random.choice([20, 64])), self.random.getrandbits(20)
                raw.request(command, offset, length, flags=self.random.choice([0, 4, 0xFF]))
            raw.send(b"\0" + self.bytes(60))
            raw.socket.close()
        self.alive("200 connections of garbage")
        section("garbage in the handshake and after it")

    def slow_reader(self):
        raw = self.raw()
        raw.socket.settimeout(2)
        try:
            for n in range(20_000):
                raw.request(READ, 0, 8 * MIB, cookie=n)
        except socket.timeout:
            pass
        self.alive("a client that asks for 160 GiB and reads nothing")
        raw.socket.close()
        section("a client that never reads its replies")

    def idle_connections(self):
        raws = []
        for _ in range(500):
            raw = Raw(self.uri)
            raw.receive(18)
            raws.append(raw)
        self.alive("500 idle connections")
        for raw in raws:
            raw.socket.close()
        section("500 idle connections")

    def run(self):
        for check in (self.flags, self.options, self.default_export, self.legacy, self.read_write,
                      self.zero_trim_cache, self.block_status, self.structured_read, self.many_in_flight,
                      self.multi_conn, self.extended_headers, self.illegal_requests, self.illegal_raw_requests,
                      self.broken_streams, self.broken_handshakes, self.garbage, self.slow_reader,
                      self.idle_connections):
            self.alive(f"the checks before '{check.__name__}'")
            try:
                check()
            except (nbd.Error, OSError, EOFError) as error:
                raise Failure(f"in '{check.__name__}' the server failed a legal step: {error!r}") from error
        self.witness.shutdown()


def main():
    if len(sys.argv) != 2:
        print("usage: nbd_protocol.py URI  (a writable export of at least 64 MiB; it is overwritten)", file=sys.stderr)
        return 2
    try:
        Checks(sys.argv[1]).run()
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    except (nbd.Error, OSError) as error:
        print(f"FAILED: cannot use {sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
