# SPDX-License-Identifier: Apache-2.0
"""A draft whose layer has weights of four bits, half of what fp8 reads; its inputs stay as they are.

vLLM quantises to fp8 while it loads, not to four bits. Here a weight is quantised once it is loaded, in GPTQ's layout
(symmetric, a scale for each group of inputs of an output), which vLLM's mixed-precision kernels take. The draft's copy
of the target's head has eight bits: a head that learns replaces rows, which a packed weight does not allow.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod, OnlineLinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

NAME = "int4_per_group"
# Inputs of an output that share a scale: the most of these by which a rank's part of a layer can be divided.
GROUPS = (128, 64, 32)
# The largest magnitude of a group becomes so many times the largest code. Less is worse for that weight and better for
# the others; each group takes what makes its squared error least.
SHRINKAGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
TYPE = scalar_types.uint4b8
# Outputs that are quantised at a time, which bounds the memory.
OUTPUTS_AT_ONCE = 2048


@register_quantization_config(NAME)
class Int4Config(QuantizationConfig):
    """Of a draft; it is no checkpoint's."""

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int4Config":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        if prefix != "draft_head":
            return Int4LinearMethod()
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        return UnquantizedLinearMethod() if current_platform.is_cpu() else Fp8PtpcOnlineLinearMethod()


class Int4LinearMethod(OnlineLinearBase):
    activation_quant_key = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        group = next((group for group in GROUPS if input_size_per_partition % group == 0), GROUPS[-1])
        config = MPLinearLayerConfig(
            full_weight_shape=(input_size, output_size),
            partition_weight_shape=(input_size_per_partition, sum(output_partition_sizes)),
            weight_type=TYPE,
            act_type=params_dtype,
            group_size=group,
            zero_points=False,
        )
        self.kernel = choose_mp_linear_kernel(config)(config, "qweight", "scales", "qzeros")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        codes, scales = quantise(layer.weight, self.kernel.config.group_size)
        del layer.weight

        def no_loader(*_: Any) -> None:
            raise NotImplementedError("weights of four bits are made of loaded ones")

        layer.qweight = PackedvLLMParameter(
            data=pack_quantized_values_into_int32(codes, TYPE, packed_dim=0).contiguous(),
            input_dim=0,
            output_dim=1,
            packed_dim=0,
            packed_factor=32 // TYPE.size_bits,
            weight_loader=no_loader,
        )
        layer.scales = GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, weight_loader=no_loader)
        self.kernel.process_weights_after_loading(layer)
        layer._already_called_process_weights_after_loading = True

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)


def quantise(
    weight: torch.Tensor,  # [num_outputs, num_inputs]
    group: int,  # inputs that share a scale; there are whole groups
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes, int32 [num_inputs, num_outputs] from 0 to 15 for -8 to 7, and scales [num_groups, num_outputs]."""
    parts = [_quantise(part, group) for part in weight.split(OUTPUTS_AT_ONCE)]
    codes, scales = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return codes, scales


def _quantise(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_outputs = weight.shape[0]
    groups = weight.float().view(num_outputs, -1, group)
    # Code 0 is -8, 15 is 7: the largest magnitude lies between the two.
    whole = groups.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny) / 7.5
    best_codes, best_scales, least = None, whole, None
    for shrinkage in SHRINKAGES:
        # As it is stored.
        scales = (whole * shrinkage).to(weight.dtype).float()
        codes = (groups / scales).round_().clamp_(TYPE.min(), TYPE.max())
        error = (codes * scales - groups).square_().sum(dim=-1, keepdim=True)
        if best_codes is None or least is None:
            best_codes, best_scales, least = codes, scales, error
            continue
        better = error < least
        best_codes, best_scales = torch.where(better, codes, best_codes), torch.where(better, scales, best_scales)
        least = torch.minimum(error, least)
    assert best_codes is not None
    codes = (best_codes + TYPE.bias).to(torch.int32).view(num_outputs, -1).t()
    return codes, best_scales.squeeze(-1).to(weight.dtype).t()
