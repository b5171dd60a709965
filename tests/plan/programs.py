"""HLO by hand, in the forms that XLA prints."""

LOOPS = """\
HloModule by_hand, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%shared (p: f32[4,16]) -> f32[] {
  %p = f32[4,16]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0,1}, to_apply=%add
}

%inner (s: (s32[], f32[4,8], f32[8,16])) -> (s32[], f32[4,8], f32[8,16]) {
  %s = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %b = f32[8,16]{1,0} get-tuple-element(%s), index=2
  %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %c = f32[] call(%dot.1), to_apply=%shared
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) tuple(%next, %a, %b)
}

%inner_cond (s.1: (s32[], f32[4,8], f32[8,16])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %unknown = s32[] custom-call(), custom_call_target="x"
  ROOT %lt.1 = pred[] compare(%i.1, %unknown), direction=LT
}

%outer_body (s.2: (s32[], f32[4,8], f32[8,16])) -> (s32[], f32[4,8], f32[8,16]) {
  %s.2 = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  ROOT %while.inner = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) while(%s.2), condition=%inner_cond, \
body=%inner, backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}
}

%outer_cond (s.3: (s32[], f32[4,8], f32[8,16])) -> pred[] {
  %s.3 = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %lt.3 = pred[]{:T(512)} compare(%i.3, %five), direction=LT
}

%wide_body (s.4: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %s.4 = (s32[], s32[]) parameter(0)
}

%wide_cond (s.5: (s32[], s32[])) -> pred[] {
  %s.5 = (s32[], s32[]) parameter(0)
  %i.5 = s32[] get-tuple-element(%s.5), index=0
  %limit.5 = s32[] get-tuple-element(%s.5), index=1
  ROOT %lt.5 = pred[] compare(%i.5, %limit.5), direction=LT
}

%wrapped_body (s.6: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %s.6 = (s32[], s32[]) parameter(0)
}

%compare_fusion (q: s32[], limit: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  %limit = s32[] parameter(1)
  ROOT %lt.6 = pred[] compare(%q, %limit), direction=LT
}

%wrapped_cond (s.7: (s32[], s32[])) -> pred[] {
  %s.7 = (s32[], s32[]) parameter(0)
  %i.7 = s32[] get-tuple-element(%s.7), index=0
  %four = s32[] constant(4)
  ROOT %f.7 = pred[] fusion(%i.7, %four), kind=kLoop, calls=%compare_fusion
}

%data_body (s.8: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %s.8 = (s32[], s32[]) parameter(0)
}

%data_cond (s.9: (s32[], s32[])) -> pred[] {
  %s.9 = (s32[], s32[]) parameter(0)
  %i.9 = s32[] get-tuple-element(%s.9), index=0
  %limit.9 = s32[] get-tuple-element(%s.9), index=1
  ROOT %lt.9 = pred[] compare(%i.9, %limit.9), direction=LT
}

ENTRY %main (x.0: f32[4,8], w.0: f32[8,16], n.0: s32[]) -> f32[] {
  %x.0 = f32[4,8]{1,0} parameter(0)
  %w.0 = f32[8,16]{1,0} parameter(1)
  %n.0 = s32[] parameter(2)
  %c0 = s32[] constant(0)
  %c2 = s32[] constant(2)
  %c9 = s32[] constant(9)
  %copied = s32[] copy(%c9)
  %state = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) tuple(%c0, %x.0, %w.0)
  %while.outer = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) while(%state), \
condition=%outer_cond, body=%outer_body
  %pair = (s32[], s32[]) tuple(%c2, %copied)
  %while.wide = (s32[], s32[]) while(%pair), condition=%wide_cond, body=%wide_body
  %pair.2 = (s32[], s32[]) tuple(%c0, %c0)
  %while.wrapped = (s32[], s32[]) while(%pair.2), condition=%wrapped_cond, body=%wrapped_body
  %pair.3 = (s32[], s32[]) tuple(%c0, %n.0)
  %while.data = (s32[], s32[]) while(%pair.3), condition=%data_cond, body=%data_body, \
metadata={op_name="jit(f)/some_scope/while"}
  %first = f32[4,16]{1,0} dot(%x.0, %w.0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = f32[] call(%first), to_apply=%shared
}
"""

# One of each, on 8 devices as data=2, expert=4; the operand is 1024 bytes on each.
COLLECTIVES = """\
HloModule collectives

%async_wrapped (p.1: bf16[8,64]) -> bf16[8,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  ROOT %a2a.1 = bf16[8,64]{1,0} all-to-all(%p.1), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter (p.2: bf16[8,64]) -> bf16[2,64] {
  %p.2 = bf16[8,64]{1,0} parameter(0)
  %ar.2 = bf16[8,64]{1,0} all-reduce(%p.2), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %b.2 = bf16[8,64]{1,0} bitcast(%ar.2)
  %z.2 = s32[] constant(0)
  ROOT %ds.2 = bf16[2,64]{1,0} dynamic-slice(%b.2, %z.2, %z.2), dynamic_slice_sizes={2,64}
}

ENTRY %main (x: bf16[8,64], s: s32[4]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %s = s32[4]{0} parameter(1)
  %ag = (bf16[8,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, metadata={op_name="jit(f)/all_gather"}
  %agd = bf16[16,64]{1,0} all-gather-done(%ag)
  %rs = bf16[1,64]{1,0} reduce-scatter(%x), channel_id=2, replica_groups={}, dimensions={0}, \
to_apply=%add
  %ar = bf16[8,64]{1,0} all-reduce(%x), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %fus = bf16[2,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %as = ((bf16[8,64]), bf16[8,64], u32[]) async-start(%x), calls=%async_wrapped
  %ad = bf16[8,64]{1,0} async-done(%as), calls=%async_wrapped
  %ra = bf16[16,64]{1,0} ragged-all-to-all(%x, %agd, %s, %s, %s, /*index=5*/%s), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}
  %cp = bf16[8,64]{1,0} collective-permute(%x), channel_id=6, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %half = bf16[8,64]{1,0} collective-permute(%x), channel_id=7, source_target_pairs={{0,4},{1,5}}
  ROOT %alone = bf16[8,64]{1,0} all-reduce(%x), channel_id=8, \
replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""
