"""``l3env validate``: the model against measurements, of operators and of whole serving engines."""

from l3env.experiments.gpu.commands import validate
from l3env.experiments.serving.commands import validate_engine

validate.command("engine")(validate_engine)

__all__ = ["validate"]
