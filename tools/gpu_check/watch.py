"""What is seen of a process while it computes: how busy the GPU is (NVML), and how often the host waits (sync_counter.c)."""

import ctypes
import statistics
import struct
import time

NVML = "libnvidia-ml.so.1"
COUNTERS = 5
PERIOD = 0.02


class Utilisation(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Nvml:
    """The first GPU's utilisation, as nvidia-smi shows it; `missing` says why there is none."""

    def __init__(self):
        self.missing, self.device = None, ctypes.c_void_p()
        try:
            self.library = ctypes.CDLL(NVML)
            code = self.library.nvmlInit_v2() or self.library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device))
        except (OSError, AttributeError) as error:
            self.missing = str(error)
            return
        if code:
            self.missing = f"NVML answers {code}"

    def busy(self):
        """Percent of the time before in which something ran on the GPU; None where it is not known."""
        if self.missing:
            return None
        found = Utilisation()
        code = self.library.nvmlDeviceGetUtilizationRates(self.device, ctypes.byref(found))
        return None if code else found.gpu


class Watch:
    """Samples the GPU until something is done, while `progress` counts what was made."""

    def __init__(self, nvml, progress):
        self.nvml, self.progress, self.samples = nvml, progress, []

    def until(self, done, deadline):
        """Whether it was done before the deadline."""
        while not done():
            if time.monotonic() > deadline:
                return False
            busy = self.nvml.busy()
            if busy is not None:
                self.samples.append((self.progress(), busy))
            time.sleep(PERIOD)
        return True

    def idle(self, last):
        """Percent of the time from the first to the last thing that was made in which the GPU did nothing."""
        busy = [share for made, share in self.samples if 1 <= made < last]
        return 100 - statistics.mean(busy) if busy else None


def waits(path):
    """Times that the host waited, and copies to the host that were begun; None where nothing was counted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < 8 * COUNTERS:
        return None
    stream, device, event, copy, to_host = struct.unpack(f"<{COUNTERS}Q", data[:8 * COUNTERS])
    return stream + device + event + copy, to_host
