"""The GPU's clocks, power and temperature while something runs.

A thread asks NVML, the driver's library behind nvidia-smi, which needs no process of its own and answers within a
millisecond. Where it is missing or refuses, there is no state, and nothing fails.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
from typing import Any

import torch

__all__ = ["Watch"]

INTERVAL = 0.02
"""Seconds between readings."""
SM, MEMORY = 1, 2
"""NVML's numbers of the clocks."""
POWER_INSTANT = 186
"""NVML's number of the power of this moment; the plain query's is an average over a second."""


class _FieldValue(ctypes.Structure):
    """`nvmlFieldValue_t`, whose value is a union: here of what power comes as."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency", ctypes.c_longlong),
        ("value_type", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_uint),
        ("rest_of_value", ctypes.c_uint),
    )


class Nvml:
    """One GPU's readings."""

    def __init__(self, uuid: str, library: str = "libnvidia-ml.so.1") -> None:
        """Raises OSError where the library or the GPU is not there."""
        self.library = ctypes.CDLL(library)
        self.device = ctypes.c_void_p()
        if self.library.nvmlInit_v2() or self.library.nvmlDeviceGetHandleByUUID(
            uuid.encode(), ctypes.byref(self.device)
        ):
            raise OSError(f"NVML knows no {uuid}")

    def read(self) -> dict[str, float]:
        """What can be read now, in MHz, W and degrees Celsius; the reasons for lower clocks are a set of bits."""
        readings = {
            "clocks.sm": self._query("nvmlDeviceGetClockInfo", SM),
            "clocks.mem": self._query("nvmlDeviceGetClockInfo", MEMORY),
            "power.draw": self._watts(),
            "temperature.gpu": self._query("nvmlDeviceGetTemperature", 0),
            "clocks_event_reasons.active": self._query(
                "nvmlDeviceGetCurrentClocksEventReasons", kind=ctypes.c_ulonglong
            ),
        }
        return {name: value for name, value in readings.items() if value is not None}

    def _query(self, function: str, *which: int, kind: type[Any] = ctypes.c_uint) -> float | None:
        value = kind()
        failed = getattr(self.library, function)(self.device, *which, ctypes.byref(value))
        return None if failed else value.value

    def _watts(self) -> float | None:
        field = _FieldValue(field=POWER_INSTANT)
        failed = self.library.nvmlDeviceGetFieldValues(self.device, 1, ctypes.byref(field)) or field.status
        milliwatts = self._query("nvmlDeviceGetPowerUsage") if failed else field.value
        return None if milliwatts is None else milliwatts / 1000


class Watch:
    """Reads the current GPU's state from the beginning of a `with` block to its end."""

    def __init__(self, device: str) -> None:
        self.readings: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read_on, daemon=True)
        self._nvml: Nvml | None = None
        if device.startswith("cuda"):
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            try:
                self._nvml = Nvml(f"GPU-{uuid}")
            except (OSError, AttributeError):  # no library, no such GPU, or too old a library
                self._nvml = None

    def __enter__(self) -> Watch:
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._nvml is not None:
            self._thread.join()

    def _read_on(self) -> None:
        assert self._nvml is not None
        try:
            self.readings.append(self._nvml.read())
            while not self._ended.wait(INTERVAL):
                self.readings.append(self._nvml.read())
        except AttributeError:  # a library without one of the functions
            pass

    def summary(self) -> dict[str, Any]:
        """Of each reading the least, the median and the largest; every reason for lower clocks; how many there were."""
        summary: dict[str, Any] = {"readings": len(self.readings)} if self.readings else {}
        for name in dict.fromkeys(name for reading in self.readings for name in reading):
            values = [reading[name] for reading in self.readings if name in reading]
            if name == "clocks_event_reasons.active":
                seen = 0
                for value in values:
                    seen |= int(value)
                summary[name] = f"{seen:#018x}"
            else:
                summary[name] = [min(values), statistics.median(values), max(values)]
        return summary
