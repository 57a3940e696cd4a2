"""Damages the files of a disk tier in random ways, between random reads, writes, evictions and restarts.

Every read must return what was written under that digest, or say that it cannot. Records that nothing happened to must be read.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.kvcache.disk.index import Reserved
from engine.kvcache.disk.outcome import Outcome
from tests.support.disk_store import aligned, digest_of, end_of_move, family_of, open_store, read, scanned, wait_for

NUM_SLOTS = 6
FORMS = [b"bf16", b"fp8"]
numbers = st.integers(0, 9)


class Disk(RuleBasedStateMachine):
    """Keeps, for each format, what was written and not evicted or forgotten since.

    `doubtful` has digests whose records may be damaged: these may be missing, but not wrong.
    """

    @initialize(num_bytes=st.sampled_from([1, 3000, 4096, 9000]), direct=st.booleans())
    def begin(self, num_bytes, direct):
        self.root = Path(tempfile.mkdtemp())
        self.num_bytes, self.direct = num_bytes, direct
        self.num_folders = self.version = 0
        self.form = FORMS[0]
        self.written = {form: {} for form in FORMS}
        self.doubtful = {form: set() for form in FORMS}
        self.torn = None  # segment, offset, and the bytes of the slot before and after the last write
        self.open()

    def open(self):
        self.store = scanned(
            open_store(self.folder, NUM_SLOTS, self.num_bytes, form=self.form, direct=self.direct, inspect=1e9, key=bytes(32))
        )

    @property
    def folder(self):
        return self.root / str(self.num_folders)

    def segment(self, number, folder=None):
        return (folder or self.folder) / f"segment-{number:05}"

    def content(self, digest):
        """Return a payload that no earlier write had."""
        self.version += 1
        return hashlib.shake_128(digest + self.version.to_bytes(4, "little")).digest(self.num_bytes)

    def raw(self, slot):
        segment, offset = self.store.files.sizes.where(slot)
        with self.segment(segment).open("rb") as file:
            file.seek(offset)
            return file.read(self.store.files.sizes.stride).ljust(self.store.files.sizes.stride, b"\0")

    def doubt(self, slots):
        """Note that the records in `slots`, of any format, may be damaged."""
        for form in FORMS:
            if form == self.form:
                here = {d for d in self.written[form] if self.store.index.find(d) in slots}
                self.doubtful[form] |= here
            else:
                self.doubtful[form] |= set(self.written[form])

    @rule(number=numbers)
    def write(self, number):
        digest = digest_of(number)
        reserved = self.store.reserve(digest, family_of(number))
        if not isinstance(reserved, Reserved):
            assert digest in self.written[self.form]
            return
        if reserved.evicted is not None:
            del self.written[self.form][reserved.evicted]
        else:
            self.doubt({reserved.slot})  # the slot may hold a record of the other format
        before, payload = self.raw(reserved.slot), self.content(digest)
        assert self.store.submit_write(reserved.slot, digest, family_of(number), aligned(payload))
        assert end_of_move(self.store) is Outcome.OK
        self.doubtful[self.form] -= {digest, reserved.evicted}
        self.torn = (*self.store.files.sizes.where(reserved.slot), before, self.raw(reserved.slot), digest, reserved.evicted)
        self.written[self.form][digest] = payload

    @rule(number=numbers)
    def read(self, number):
        digest = digest_of(number)
        found = read(self.store, digest)
        if isinstance(found, bytes):
            assert found == self.written[self.form][digest]
        else:
            assert digest not in self.written[self.form] or digest in self.doubtful[self.form]
            self.written[self.form].pop(digest, None)
            self.wait_for_erasures()

    @rule(number=numbers)
    def forget_family(self, number):
        self.store.forget_family(family_of(number))
        for other in range(10):
            if family_of(other) == family_of(number):
                self.written[self.form].pop(digest_of(other), None)
        self.wait_for_erasures()

    @rule()
    def forget_all(self):
        self.store.forget_all()
        self.written[self.form].clear()
        self.wait_for_erasures()

    def wait_for_erasures(self):
        wait_for(self.store, lambda: not self.store.index.condemned)

    @rule(direct=st.booleans())
    def restart(self, direct):
        assert self.store.close()
        self.direct = direct
        self.open()

    @rule()
    def restart_with_the_other_format(self):
        """What the other format's records went through meanwhile is not known, except that none may be read wrong."""
        assert self.store.close()
        self.form = FORMS[1 - FORMS.index(self.form)]
        self.doubtful[self.form] |= set(self.written[self.form])
        self.torn = None
        self.open()

    @rule(share=st.floats(0, 1), in_header=st.booleans())
    def crash_in_the_last_write(self, share, in_header):
        """Go on with a copy of the folder in which only the first bytes of the last write arrived."""
        if self.torn is None:
            return
        segment, offset, before, after, digest, evicted = self.torn
        present = self.raw_at(segment, offset, len(after))
        crashed = self.folder
        self.num_folders += 1
        shutil.copytree(crashed, self.folder)
        assert self.store.close()
        shutil.rmtree(crashed)
        if present == after:
            whole = int(share * (140 if in_header else len(after)))
            with self.segment(segment).open("r+b") as file:
                file.seek(offset)
                file.write(after[:whole] + before[whole:])
            self.doubtful[self.form] |= {digest}
            if evicted is not None and before[:8] == b"TIDEKV\r\n":
                self.evicted_may_be_back(evicted, before)
        self.torn = None
        self.open()

    def evicted_may_be_back(self, evicted, before):
        if evicted not in self.written[self.form]:
            self.written[self.form][evicted] = before[4096 : 4096 + self.num_bytes]
            self.doubtful[self.form] |= {evicted}

    def raw_at(self, segment, offset, num_bytes):
        with self.segment(segment).open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)

    @rule(
        slot=st.integers(0, NUM_SLOTS - 1),
        share=st.floats(0, 1, exclude_max=True),
        bit=st.integers(0, 7),
        in_header=st.booleans(),
    )
    def flip_a_bit(self, slot, share, bit, in_header):
        segment, offset = self.store.files.sizes.where(slot)
        at = offset + int(share * (140 if in_header else self.store.files.sizes.stride))
        with self.segment(segment).open("r+b") as file:
            file.seek(at)
            byte = file.read(1) or b"\0"
            file.seek(at)
            file.write(bytes([byte[0] ^ 1 << bit]))
        self.doubt({slot})

    @rule(number=st.integers(0, 1), share=st.floats(0, 1))
    def cut_a_file(self, number, share):
        path = self.segment(number)
        with path.open("r+b") as file:
            file.truncate(int(share * path.stat().st_size))
        self.doubt(set(self.store.files.sizes.slots(number)))

    @invariant()
    def holds(self):
        self.store.check()
        assert self.store.health.is_on
        sizes = self.store.files.sizes
        cap = sum(sizes.file_bytes(number) for number in range(sizes.num_segments))
        assert sum(path.stat().st_size for path in self.folder.glob("segment-*")) <= cap

    def teardown(self):
        for number in range(10):
            self.read(number)
        assert self.store.close()
        shutil.rmtree(self.root)


TestDisk = Disk.TestCase
TestDisk.settings = settings(max_examples=15, stateful_step_count=30)
