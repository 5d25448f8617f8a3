"""LoRA whose rank is searched: two short trials, then the better one is trained from the start."""

from functools import partial

from tpme.methods.lora import LoRA


class SearchesRank(LoRA):
    """The trials are forks; so is the final model, which is adopted before it is trained.

    Its structure is not that of the cell's options.
    """

    def run(self, context):
        recalls = {
            rank: context.once("search", f"rank {rank}", partial(_trial, context, self._with(rank)))["recall_10"]
            for rank in (2, 3)
        }
        context.adopt(context.fork(self._with(max(recalls, key=recalls.get)), context.seed))
        context.train()

    def _with(self, rank):
        return LoRA(self.config.model_copy(update={"rank": rank}))


def _trial(context, method):
    fork = context.fork(method, seed=context.seed)
    fork.train(epochs=1, kind="search")
    return {"recall_10": fork.validate().recall_10}


METHOD = SearchesRank
