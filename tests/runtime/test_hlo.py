"""Operations of compiled programs, read from texts in the form that XLA prints."""

import jax
import jax.numpy as jnp

from diffusion.runtime import hlo

TEXT = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %b = f32[] parameter(1)
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%inside (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %reduced = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %y = f32[8]{0} get-tuple-element(%state), index=1
  %next = f32[8]{0} fusion(%y), kind=kLoop, calls=%sum
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %next)
}

%more (state.1: (s32[], f32[8])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main (p: f32[4], q: bf16[2,3]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %q = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(1)
  %begun = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%p), calls=%inside
  %done = f32[4]{0} async-done(%begun)
  %gathered = (bf16[2,3]{1,0}, bf16[4,3]{1,0}) all-gather-start(%q), dimensions={0}
  %whole = bf16[4,3]{1,0} all-gather-done(%gathered)
  %both = (f32[4]{0}, f32[2]{0}) all-reduce(%done, %done), to_apply=%sum
  %start = (s32[], f32[8]{0}) tuple(%p, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%more, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_each_operation_that_takes_time_is_found_once():
    """Also within loops, and what runs asynchronously under the name of what it does."""
    assert hlo.operations(TEXT) == [
        ('all-reduce', 16, False),
        ('all-gather', 24, False),
        ('all-reduce', 24, False),
        ('fusion', 32, True),
    ]


def test_messages_are_counted_by_kind():
    found = hlo.collectives(hlo.operations(TEXT))
    assert found == {'all-reduce': {'count': 2, 'bytes': 40}, 'all-gather': {'count': 1, 'bytes': 24}}


def test_a_program_of_this_machine():
    """A loop around one product: the product is in the loop, and no message is sent."""
    program = (
        jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, y: jnp.sin(y @ x), x)).lower(jnp.ones((64, 64))).compile()
    )
    found = hlo.operations(program.as_text())
    assert any(op.in_loop and op.nbytes == 64 * 64 * 4 for op in found)
    assert hlo.collectives(found) == {}
