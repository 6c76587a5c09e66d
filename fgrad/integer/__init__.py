"""Programs without floats: a traced function in integers, trained in integers."""

from fgrad.integer import audit, loss
from fgrad.integer.convert import Program, convert, integers
from fgrad.integer.exported import export
from fgrad.integer.ranges import ConversionError, Fixed
from fgrad.integer.to_c import CProgram, to_c
from fgrad.integer.training import State, TrainStep, train_step

__all__ = [
    "CProgram",
    "ConversionError",
    "Fixed",
    "Program",
    "State",
    "TrainStep",
    "audit",
    "convert",
    "export",
    "integers",
    "loss",
    "to_c",
    "train_step",
]
