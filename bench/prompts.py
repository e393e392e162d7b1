"""What bench/speculation.py asks a chat model for: replies that copy much of the prompt, and others."""

from __future__ import annotations

_HARBOUR = """\
The harbour at Lindholm has three piers. The north pier is for fishing boats, which leave at four in the \
morning and come back before noon. The middle pier belongs to the ferry, which crosses to the islands \
twice a day in summer and once a day in winter. The south pier is the oldest. It was built of granite in \
1874, after a storm had carried away the wooden one. On Sundays the market stands along it: bread, smoked \
eel, candles, and second-hand books in boxes that are covered with oilcloth when it rains. The lighthouse \
stands a mile further out, on a rock that the sea covers at high water. Its keeper came ashore every \
second week until 1962, when the lamp was given a motor and a clock. The house beside it is empty now, \
and the door is kept shut with a rope. In autumn the children row out to it, which is forbidden, and come \
back with their pockets full of mussels. The harbour master lives above the customs house. Every evening \
at six he writes down the height of the water, the wind and the number of ships, as those before him have \
done since 1851. Nobody has ever asked to see the books, but there are forty of them, and they stand in a \
row on a shelf behind his desk."""

_SUN = """\
The sun is a star at the center of our solar system. It is made mostly of hydrogen and helium, and it is \
so large that more than a million planets the size of the Earth would fit inside it. Light from the sun \
takes about eight minutes to reach the Earth. Without this light there would be no plants, no animals and \
no people. The Earth travels around the sun once a year. The moon travels around the Earth once a month. \
There are eight planets in the solar system. Mercury is the smallest planet, and it is the closest to the \
sun. Venus is the hottest planet, because its thick clouds keep the heat from escaping. Mars is called \
the red planet, because its soil is full of rust. Jupiter is the largest planet, and it has a great red \
storm that is wider than the Earth. Saturn is known for its bright rings, which are made of ice and rock. \
Uranus and Neptune are cold, dark and very far away. Beyond them there are many small, icy worlds, and \
the best known of these is Pluto. People have sent machines to all of the planets, but they have walked \
only on the moon. The first of them walked there in the summer of 1969, and the last of them in the \
winter of 1972."""

_ERRANDS = """\
1. Buy two loaves of rye bread
2. Return the library books
3. Call the plumber about the kitchen tap
4. Pay the electricity bill before Friday
5. Water the tomatoes on the balcony
6. Write to Aunt Margaret in Aberdeen
7. Take the bicycle to the repair shop
8. Order printer paper and blue ink
9. Book the train to Edinburgh for the 14th
10. Clean the windows on the street side
11. Ask Tom whether he still needs the ladder
12. Cancel the newspaper for August
13. Measure the bedroom door
14. Weigh the parcel for Helen
15. Thank Mrs. Morris for the apples"""

_CODE = """\
def save(path, records):
    with open(path, "w") as lines:
        for name, value in records:
            lines.write(f"{name} = {value}\\n")"""

COPY_HEAVY = {
    "text, repeated": f"Repeat this text verbatim, word for word:\n\n{_SUN}",
    "text, proofread": f"Please fix any spelling mistakes in this text and change nothing else:\n\n{_SUN}",
    "list, repeated": f"Repeat this list word for word, with all of its lines:\n\n{_ERRANDS}",
}
OTHERS = {
    "story": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "facts": "What is photosynthesis, and why does it matter? Explain it to a school class.",
    "chat": "My neighbour plays the drums at night and I cannot sleep. What should I say to him?",
    "code": "Write a Python function that checks whether a word is a palindrome, and explain how it works.",
    "French": "Raconte-moi une journée à la campagne, en français, avec beaucoup de détails.",
    "summary": f"What is this text about? Answer in your own words.\n\n{_HARBOUR}",
    "code, changed": f"Add a docstring and error handling to this function:\n\n```python\n{_CODE}\n```",
}
