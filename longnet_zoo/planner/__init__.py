"""What a training step of one sequence over many ranks will cost, on paper."""

from .block import PRECISIONS, Sizes
from .command import add_plan_command, draw_plans, run_plan
from .hardware import GPUS, Gpu, find_gpu
from .memory import ActivationMemory, Part, activation_memory
from .network import Network, describe
from .plan import MethodPlan, Plan, PlanConfig, RankMemory, plan_step
from .timing import StepTime
from .traffic import METHODS, Method, Traffic, layer_traffic

__all__ = [
    "GPUS",
    "METHODS",
    "PRECISIONS",
    "ActivationMemory",
    "Gpu",
    "Method",
    "MethodPlan",
    "Network",
    "Part",
    "Plan",
    "PlanConfig",
    "RankMemory",
    "Sizes",
    "StepTime",
    "Traffic",
    "activation_memory",
    "add_plan_command",
    "describe",
    "draw_plans",
    "find_gpu",
    "layer_traffic",
    "plan_step",
    "run_plan",
]
