"""The one list of requests: every way to choose a token, short and long prompts, several languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from runtime.types import Request
from tests.rule.requests import PARAMS

# Scripts of one to four bytes a character, with and without spaces, from the left and from the right.
TEXTS = (
    "The wind that comes down the valley is cold and dry, and it clears the sky for days. ",
    "El viento del norte barre las nubes: ¿cuántos días más soplará, señor? ¡Quién sabe! ",
    "Der kühle Fallwind fegt übers Mittelmeer; größere Schiffe bleiben heute im Hafen. ",
    "Холодный ветер дует с гор к морю, и небо над городом снова ясное. ",
    "Ο βοριάς κατεβαίνει από τα βουνά και καθαρίζει τον ουρανό. ",
    "تهب الريح الباردة من الشمال فتصفو السماء فوق المدينة. ",
    "उत्तर से ठंडी हवा आती है और आसमान साफ़ हो जाता है। ",
    "北風從山谷吹來,天空連日晴朗,船都留在港口裡。",
    "北の冷たい風が谷を下り、空は何日も晴れている。",
    "산에서 찬 바람이 불어와 며칠째 하늘이 맑다. ",
    "ลมเหนือพัดลงมาจากหุบเขา ท้องฟ้าจึงแจ่มใส ",
    "🌬️🏔️→🌊 14 °C, 62 kt; 👩‍👩‍👧 said “brr”… ",
    "def gust(knots: float) -> str:\n    return 'gale' if knots >= 34 else f'{knots:.1f}'\n",
)
PROMPTS = (1, 5, 16, 17, 33, 64, 65, 0)  # tokens; 0: all that the context has room for


def request_list(
    encode: Callable[[str], Sequence[int]], vocab: int, context: int, *, longest: int
) -> list[Request]:
    """Requests with replies of up to `longest` tokens, all seeded, some of which share a beginning, and
    some with stop tokens that do come up."""
    rng = np.random.default_rng(vocab)
    texts = [list(encode(text)) for text in TEXTS]
    made = []
    for i, params in enumerate([*PARAMS, *PARAMS[:4]]):
        most = longest - i % 5 if i != 8 else 2 * longest
        room = context - most - 1
        length = min(PROMPTS[i % len(PROMPTS)] or room, room)
        first = texts[0] if i % 3 == 0 else []
        own = texts[i % len(texts)]
        prompt = (first[: length - length // 4] + own * (length // len(own) + 1))[:length]
        few = min(vocab // 16, 1000)  # the gateway takes 1,024
        stops = tuple(rng.choice(vocab, few, replace=False).tolist()) if i % 4 in (1, 3) else ()
        seed = params.seed if params.seed is not None else i
        made.append(Request(f"r{i}", tuple(prompt), replace(params, seed=seed, max_tokens=most), stops))
    return made
