"""LoRA whose dropout is searched: two short trials, then the better one is trained from the start."""

from functools import partial

from tpme.methods.lora import LoRA


class SearchesDropout(LoRA):
    """The trials are forks; so is the final model, which is adopted before it is trained."""

    def run(self, context):
        recalls = {
            rate: context.once("search", f"dropout {rate}", partial(_trial, context, self._with(rate)))["recall_10"]
            for rate in (0.0, 0.1)
        }
        context.adopt(context.fork(self._with(max(recalls, key=recalls.get)), context.seed))
        context.train()

    def _with(self, rate):
        return LoRA(self.config.model_copy(update={"dropout": rate}))


def _trial(context, method):
    fork = context.fork(method, seed=context.seed)
    fork.train(epochs=1, kind="search")
    return {"recall_10": fork.validate().recall_10}


METHOD = SearchesDropout
