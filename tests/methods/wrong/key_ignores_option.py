"""A decoupled method whose option changes what is read, behind the back of ``reads``."""

from tpme.methods.base import Method, MethodConfig, fusion_parameters

FAILS = "cache_key_names_what_is_read"


class SkipConfig(MethodConfig):
    """Whether the last layer is skipped."""

    skip_last: bool = False


class KeyIgnoresOption(Method):
    """Reads the final state of encoders whose last layer is skipped, if so asked."""

    Config = SkipConfig
    decoupled = True
    identity_at_start = False

    def adapt(self, model, schedule):
        for view in model.views.values():
            if self.config.skip_last:
                view.layers[-1].register_forward_hook(_input)

    def trainable_parameters(self, task, views):
        return fusion_parameters(task)


def _input(_module, args, output):
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


METHOD = KeyIgnoresOption
