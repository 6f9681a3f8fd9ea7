"""A small executable as the compiler for TPUs writes it; its numbers are known."""

from gfl_jax.tools.preflight.topology import CHIPS

V5E = CHIPS["v5e"]

# Cut from what the compiler writes for a small step: names and layouts are its own.
TEXT = """\
HloModule jit__fun, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

FileNames
1 "step.py"

%fused_computation.1 (param_0: bf16[8,64,64,128], param_1: f32[3,3,128,128]) -> bf16[8,64,64,128] {
  %param_0 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)} parameter(1)
  %convert.1 = bf16[3,3,128,128]{3,2,1,0:T(8,128)(2,1)} convert(%param_1), metadata={op_name="jit(_fun)/shard_map/jvp(neck)/convert_element_type"}
  ROOT %convolution.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} convolution(%param_0, %convert.1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(_fun)/shard_map/jvp(neck)/conv_general_dilated"}
}

%fused_computation.2 (param_0.2: f32[100,1024], param_1.2: s32[]) -> f32[1,1024] {
  %param_0.2 = f32[100,1024]{1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%param_0.2, %param_1.2), dynamic_slice_sizes={1,1024}
}

%fused_computation.3 (param_0.3: s32[2,86]) -> s32[2,86] {
  %param_0.3 = s32[2,86]{1,0:T(2,128)} parameter(0)
  %custom-call.3 = s32[2,86,2]{2,1,0:T(8,128)} custom-call(%param_0.3), custom_call_target="GatherScatterIndicesBitpacked", metadata={op_name="jit(_fun)/shard_map/jvp(losses)/jit(take_along_axis)/gather"}
  ROOT %gather.13 = s32[2,86]{1,0:T(2,128)} gather(%param_0.3, %custom-call.3), offset_dims={}, slice_sizes={1,1}
}

%region_6.7 (wide.param.448: (s32[], f32[100,1024])) -> pred[] {
  %constant.431 = s32[]{:T(128)} constant(9)
  %wide.param.448 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.3276 = s32[]{:T(128)} get-tuple-element(%wide.param.448), index=0
  ROOT %lt.182 = pred[]{:T(512)} compare(%get-tuple-element.3276, %constant.431), direction=LT
}

%region_4.6 (wide.param.449: (s32[], f32[100,1024])) -> (s32[], f32[100,1024]) {
  %constant.329 = s32[]{:T(128)} constant(1)
  %wide.param.449 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.449), index=0
  %get-tuple-element.2 = f32[100,1024]{1,0:T(8,128)} get-tuple-element(%wide.param.449), index=1
  %fusion.2 = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%get-tuple-element.2, %get-tuple-element.1), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(_fun)/shard_map/jvp(losses)/assign/vmap()/while/body/dynamic_slice"}, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %dynamic-update-slice.1 = f32[100,1024]{1,0:T(8,128)} dynamic-update-slice(%get-tuple-element.2, %fusion.2, %get-tuple-element.1)
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.1, %constant.329)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) tuple(%add.1, %dynamic-update-slice.1)
}

ENTRY %main.1_spmd (param.1: bf16[8,64,64,128], param.2: f32[3,3,128,128], param.3: f32[100,1024]) -> bf16[8,64,64,128] {
  %param.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %param.2 = f32[3,3,128,128]{3,2,1,0:T(8,128)} parameter(1)
  %param.3 = f32[100,1024]{1,0:T(8,128)} parameter(2)
  %copy-start.1 = (f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)}, f32[3,3,128,128]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%param.2), cross_program_prefetch_index=0
  %copy-done.1 = f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %fusion.1 = bf16[8,64,64,128]{3,2,1,0:T(8,128)(2,1)} fusion(%param.1, %copy-done.1), kind=kOutput, calls=%fused_computation.1, backend_config={"window_config":{"estimated_cycles":"3000000"}}
  %copy.1 = bf16[8,64,64,128]{3,0,2,1:T(8,128)(2,1)} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"100"}}
  %constant.1 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) tuple(%constant.1, %param.3)
  %while.1 = (s32[]{:T(128)}, f32[100,1024]{1,0:T(8,128)}) while(%tuple.2), condition=%region_6.7, body=%region_4.6
  %get-tuple-element.9 = f32[100,1024]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %top_k.94 = (f32[100,1024]{1,0:T(8,128)}, s32[100,1024]{1,0:T(8,128)}) sort(%get-tuple-element.9, %get-tuple-element.9), dimensions={1}, to_apply=%region_6.7, metadata={op_name="jit(_fun)/shard_map/detections/vmap()/top_k"}
  %custom-call.1 = s32[2,86]{1,0:T(2,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.3 = s32[2,86]{1,0:T(2,128)S(1)} fusion(%top_k.94), kind=kCustom, calls=%fused_computation.3
  %all-reduce.35 = (f32[16]{0:T(128)S(1)}, /*index=1*/f32[3,3,128,128]{3,2,1,0:T(8,128)S(1)}) all-reduce(%copy-done.1, %copy-done.1), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_6.7
  %psum.836 = s32[]{:T(128)} all-reduce(%constant.1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%region_6.7
  ROOT %bitcast.1 = bf16[8,64,64,128]{3,0,2,1:T(8,128)(2,1)} bitcast(%copy.1)
}
"""  # noqa: E501
IMAGES = 8 * 64 * 64 * 128 * 2
KERNEL = 3 * 3 * 128 * 128 * 4
ROWS = 104 * 1024 * 4  # 100, padded to tiles of 8


def find(module, name):
    """A computation and the instruction of this name in it."""
    return next((c, c[name]) for c in module.computations.values() if name in c)
