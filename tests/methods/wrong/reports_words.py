"""LoRA that reports a word."""

from tpme.methods.lora import LoRA

FAILS = "vectors_and_report"


class ReportsWords(LoRA):
    """A counter is a number."""

    def report(self, model):
        return {"rank": "eight"}


METHOD = ReportsWords
