"""The one list of requests: every way to choose a token, short and long prompts, several languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from runtime.types import Request, SamplingParams
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
# Tokens of the prompts, as far as the context has room; 0: all of it. With its reply one crosses every border
# of attention's segments, which are of 128 positions, and of 512 in fp32.
PROMPTS = (1, 5, 16, 17, 33, 127, 65, 0, 1, 5, 16, 17, 33, 64, 129, 255, 509, 24, 40)


# Replies that repeat themselves, so that guesses from the text are tried: by how many tokens are much
# likelier than all others, with what else. One token is foreseen all the time, two are at times.
REPEATS = (
    (2, SamplingParams(temperature=5.0, seed=21, logprobs=1)),  # hot enough for any model to doubt
    (1, SamplingParams(temperature=0.0, logprobs=0)),
    (2, SamplingParams(temperature=0.0, frequency_penalty=0.5)),
    (1, SamplingParams(temperature=1.0, seed=22, logprobs=2)),
)
LIKELIER = 100.0  # logits
REPEATED = 24  # tokens, at the least, of which some repeat others
SHORT = 33  # tokens of a prompt


def request_list(
    encode: Callable[[str], Sequence[int]], vocab: int, context: int, *, longest: int
) -> list[Request]:
    """Requests with replies of up to `longest` tokens, or three times as many where they repeat
    themselves. All are seeded; some share a beginning, some have stop tokens that do come up."""
    rng = np.random.default_rng(vocab)
    texts = [list(encode(text)) for text in TEXTS]
    made = []
    plain = [*PARAMS, *PARAMS[:3]]
    for i, length in enumerate(PROMPTS):
        if repeats := i >= len(plain):
            few, params = REPEATS[i - len(plain)]
            likely = rng.choice(vocab, few, replace=False).tolist()
            params = replace(params, logit_bias=tuple((token, LIKELIER) for token in sorted(likely)))
        else:
            params = plain[i]
        most = longest - i % 5 if i != 8 else 2 * longest
        if repeats:
            most = max(REPEATED, 3 * longest)
        room = context - most - 1
        length = min(length or room, room)
        first = texts[0] if i % 3 == 0 else []
        own = texts[i % len(texts)]
        prompt = (first[: length - length // 4] + own * (length // len(own) + 1))[:length]
        few = min(vocab // 16, 1000)  # the gateway takes 1,024
        stops = (
            tuple(rng.choice(vocab, few, replace=False).tolist()) if i % 4 in (1, 3) and not repeats else ()
        )
        seed = params.seed if params.seed is not None else i
        made.append(Request(f"r{i}", tuple(prompt), replace(params, seed=seed, max_tokens=most), stops))
    return made


def growing(requests: Sequence[Request], tokens: int) -> list[Request]:
    """Those with short prompts, with replies of `tokens` tokens: in a small room they take it from each
    other, again and again."""
    short = [request for request in requests if len(request.prompt) <= SHORT]
    return [
        replace(
            r, request_id=f"{r.request_id}+", params=replace(r.params, max_tokens=tokens, min_tokens=tokens)
        )
        for r in short
    ]
