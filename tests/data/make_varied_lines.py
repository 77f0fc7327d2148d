#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/varied_lines.txt: 1,000 lines of text that is hard on a tokenizer.

Many scripts, emoji, code, long digits, odd spaces, contractions, control characters, and mixtures of these.
The same on every machine: the numbers come from splitmix64 with the seed below. All text was written for this file.

    python3 tests/data/make_varied_lines.py [FILE]
"""
import pathlib
import sys

SEED = 20240607
LINES = 1000

SENTENCES = {
    "latin": [
        "The river crossed the old town before anybody thought of building a bridge.",
        "À la carte ou menu du jour ? L'été dernier, c'était déjà complet.",
        "Die Straße nach Köln führt über Höfe, Gärten und süße Äpfel.",
        "El niño pidió piñones y agüita; ¿qué más da?",
        "Příliš žluťoučký kůň úpěl ďábelské ódy.",
        "Zażółć gęślą jaźń, a potem odpocznij.",
        "Şişli'de İstanbul'un ışıkları söndü; ığdır uzakta kaldı.",
        "Tiếng Việt có dấu: một người đàn ông đi bộ dưới mưa.",
        "Blåbærsyltetøy på brødskive smaker godt i skjærgården.",
        "O coração não esquece a canção da manhã.",
        "Ég veit ekki hvað þú átt við, sagði maðurinn.",
        "Çfarë dëshiron të hash sot në mëngjes?",
    ],
    "greek": ["Ο ποταμός περνά μέσα από την πόλη.", "Καλημέρα, τι κάνεις σήμερα;", "Ἐν ἀρχῇ ἦν ὁ λόγος."],
    "cyrillic": [
        "Река течёт через старый город, и никто её не слышит.",
        "Її щастя — то ґанок, яблуня й тиша.",
        "Добро јутро, како сте данас?",
        "Ёлка, подъезд и съёмка: всё на своих местах.",
    ],
    "arabic": ["النهر يمر عبر المدينة القديمة.", "السَّلامُ عَلَيْكُمْ وَرَحْمَةُ اللهِ", "قیمت این کتاب ۲۵۰ تومان است.", "٠١٢٣٤٥٦٧٨٩ أرقام"],
    "hebrew": ["הנהר עובר דרך העיר העתיקה.", "שָׁלוֹם עֲלֵיכֶם, מַה נִּשְׁמַע?", "ספר חדש ב־49 ₪"],
    "devanagari": ["नदी पुराने शहर से होकर बहती है।", "क्या आप कल आएँगे? ज़रूर!", "संख्या १२३४५६७८९० है।", "क्षत्रिय ज्ञान श्री"],
    "indic": ["নদী শহরের মাঝ দিয়ে বয়ে যায়।", "நதி நகரத்தின் வழியாக ஓடுகிறது.", "నది పట్టణం గుండా ప్రవహిస్తుంది.", "ನದಿ ಹರಿಯುತ್ತದೆ", "ਦਰਿਆ ਸ਼ਹਿਰ ਵਿੱਚੋਂ ਲੰਘਦਾ ਹੈ।", "ගඟ නගරය හරහා ගලා යයි."],
    "thai": ["แม่น้ำไหลผ่านเมืองเก่า", "ราคา ๒๕๐ บาท ถูกมากครับ", "ນ້ຳໄຫຼຜ່ານເມືອງ", "ទន្លេហូរកាត់ទីក្រុង", "မြစ်သည် မြို့ကို ဖြတ်စီးသည်။"],
    "cjk": [
        "河流穿过老城，没有人注意到它。",
        "圖書館下個月搬到新的大樓。",
        "川は古い町を流れている。コンピューターで「確認」してください。",
        "ｶﾀｶﾅ半角と全角ＡＢＣ１２３を混ぜる",
        "々〆ヶ 𠮷野家 㐀㐁 丂丄",
        "价格：￥１２３４．５０（含税）",
    ],
    "hangul": ["강은 오래된 도시를 지나 흐른다.", "안녕하세요? 오늘은 2024년 6월 7일입니다.", "\u1112\u1161\u11ab\u1100\u1173\u11af 조합형", "ㅋㅋㅋㅋ ㅠㅠ"],
    "other": ["ქართული ენა ძალიან ლამაზია.", "Հայերեն լեզուն հին է։", "አማርኛ ቋንቋ ፊደል አለው።", "ᚠᚢᚦᚨᚱᚲ", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "བོད་ཡིག་ནི།", "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ", "𐌰𐌱𐌲 𐍈 𐤀𐤁", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ℵ₀ ∑∞"],
    "combining": ["e\u0301te\u0301 a\u030a o\u0308 n\u0303", "Z\u0351\u036b\u0343a\u0329\u032bl\u034dg\u0317o\u0300\u0301\u0302", "q\u0307\u0323 s\u0323\u0307 \u1e9b\u0323", "\u0301 leading mark", "a\u200db\u200cc\u2060d\ufeffe\u00adf"],
}

EMOJI = ["😀", "😂", "🙏", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🏴‍☠️", "🇩🇪", "🇯🇵", "🇧🇷", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "❤️", "☎︎", "1️⃣", "#️⃣", "🧑🏿‍💻", "🫠", "🪿", "⌛", "♟️", "🤷🏻‍♀️"]

CODE = [
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    "    return [x**2 for x in range(10) if x % 3 == 0]",
    "\tif err != nil {\treturn nil, fmt.Errorf(\"open %q: %w\", path, err)\t}",
    "SELECT id, COUNT(*) FROM orders WHERE total >= 99.95 GROUP BY id;",
    "const f = async ({ a, b = 2 }) => await fetch(`/api/${a}?b=${b}`);",
    "#include <vector>  // std::vector<std::pair<int, double>> v{{1, 2.5}};",
    "fn main() -> Result<(), Box<dyn Error>> { println!(\"{:?}\", 1_000u64); Ok(()) }",
    "<div class=\"row\" id='x-1'>&nbsp;&amp;<br/></div>",
    "{\"name\": \"value\", \"list\": [1, 2.0, -3e-7, null, true], \"u\": \"\\u00e9\"}",
    "grep -rn --include='*.hpp' \"TODO\\|FIXME\" . | awk -F: '{print $1}' | sort -u",
    "x = lambda *a, **k: {**k, 'n': len(a)}  # noqa: E731",
    "\\begin{align} \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2} \\end{align}",
    "0xDEADBEEF 0b1011_0110 0o777 1e-10 .5 5. 1'000'000 0x1.8p+3",
    "https://example.org/a/b?q=1&r=%20#frag user@example.com 192.168.0.1 [::1]:8080",
    "std::cout<<\"a\"<<'\\n';while(x-->0);a=b?c:d;p->q.*r;",
    "def __init__(self, *, name: str = \"\", ids: list[int] | None = None) -> None: ...",
    "        }      else      {        // eight spaces",
    "class Größe: π = 3.14159; naïve_été = '日本'",
    "SHA256=9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "|---|:---:|---:| **bold** _it_ ~~no~~ `code` [a](b) ![c](d)",
]

CONTRACTIONS = [
    "I'm sure they've said it's what we'd do, and you'll see he isn't, can't, won't.",
    "I'M SURE THEY'VE SAID IT'S WHAT WE'D DO; YOU'LL SEE.",
    "rock 'n' roll, '90s, 'tis, o'clock, y'all'd've, 's 't 're 've 'm 'll 'd",
    "It\u2019s \u2018quoted\u2019 and \u201cdouble\u201d \u2014 don\u2019t\u2026",
    "'sword 'tall 'red 'very 'mad 'llama 'door x's' y't",
    "the '\u017f and 'S and \"'re\" tests",
]

SPACES = [" ", "  ", "   ", "    ", "\t", "\t\t", " \t ", "\u00a0", "\u00a0 ", "\u3000", "\u2003", "\u2009", "\u202f", "\u1680", "\u2028", "\u2029", "\u0085", "\u200b", "\u180e", "\u205f", "\u000b", "\u000c", "\r", "        ", " " * 17, "\u2000\u2001"]

WORDS = "river bridge council budget flood park water school library move report plan cost delay street house north".split()

PUNCTUATION = list("!?.,;:-_()[]{}<>/\\|@#$%^&*+=~`\"'") + ["...", "--", "—", "«", "»", "¿", "¡", "§", "€", "₹", "©", "°", "→", "≠", "½", "²", "Ⅷ", "①", "‰"]

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "|im_end|>", "<filename>", "<repo_name>"]


class Rng:
    def __init__(self, seed):
        self.state = seed & (2**64 - 1)

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        return z ^ (z >> 31)

    def below(self, n):
        return self.next() % n

    def pick(self, items):
        return items[self.below(len(items))]


def digits(rng):
    n = rng.pick([1, 2, 3, 4, 5, 7, 9, 12, 20, 33, 64])
    text = "".join(str(rng.below(10)) for _ in range(n))
    kind = rng.below(6)
    if kind == 0 and n > 3:
        return ",".join(text[max(0, i - 3) : i] for i in range(n, 0, -3))
    if kind == 1:
        return text + "." + str(rng.below(1000))
    if kind == 2:
        return "-" + text + rng.pick(["%", "km", "€", "th", " kg", "x"])
    if kind == 3:
        return "".join(chr(rng.pick([0x660, 0x966, 0xE50, 0xFF10]) + int(c)) for c in text[:8])
    return text


def any_sentence(rng):
    return rng.pick(SENTENCES[rng.pick(sorted(SENTENCES))])


def some_control(rng):
    # Every control character but the newline, which ends a line of the file.
    return chr(rng.pick([c for c in range(32) if c != 10] + [127, 0x80, 0x9F]))


def random_letters(rng):
    """Code points from all over the planes that have had a meaning since Unicode 10."""
    ranges = [(0x21, 0x7E), (0xA1, 0x24F), (0x250, 0x2FF), (0x370, 0x377), (0x400, 0x52F), (0x5D0, 0x5EA),
              (0x620, 0x64A), (0x904, 0x939), (0xE01, 0xE3A), (0x10A0, 0x10C5), (0x1E00, 0x1EFF), (0x2010, 0x2027),
              (0x2100, 0x214F), (0x2190, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x25FF), (0x3041, 0x3096),
              (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x10400, 0x1044F),
              (0x1D400, 0x1D454), (0x1F300, 0x1F5FF), (0x20000, 0x2A6D6), (0xE000, 0xE0FF), (0x100000, 0x1000FF)]
    return "".join(chr(a + rng.below(b - a + 1)) for a, b in (rng.pick(ranges) for _ in range(2 + rng.below(14))))


def mixed(rng):
    makers = [lambda: rng.pick(WORDS), lambda: rng.pick(WORDS).capitalize(), lambda: rng.pick(WORDS).upper(),
              lambda: digits(rng), lambda: rng.pick(EMOJI), lambda: rng.pick(PUNCTUATION),
              lambda: rng.pick(any_sentence(rng).split()), lambda: rng.pick(["'s", "'t", "'ll", "n't", "'RE"]),
              lambda: rng.pick(SPACES), lambda: random_letters(rng)[:4]]
    out = ""
    for _ in range(4 + rng.below(14)):
        out += rng.pick(makers)()
        if rng.below(2):
            out += rng.pick(SPACES) if rng.below(4) == 0 else " "
    return out


def line(rng, i):
    kind = i % 20
    if kind < 5:
        return any_sentence(rng)
    if kind < 8:
        return rng.pick(CODE)
    if kind == 8:
        return rng.pick(CONTRACTIONS)
    if kind == 9:
        return " ".join(digits(rng) for _ in range(1 + rng.below(4)))
    if kind == 10:
        return "".join(rng.pick(EMOJI) + rng.pick(["", " ", "!", "x"]) for _ in range(1 + rng.below(8)))
    if kind == 11:
        return rng.pick(SPACES) + rng.pick(WORDS) + rng.pick(SPACES) + rng.pick(SPACES) + rng.pick(WORDS) + rng.pick(SPACES)
    if kind == 12:
        return "".join(rng.pick(SPACES) for _ in range(1 + rng.below(6)))
    if kind == 13:
        return rng.pick(WORDS) + some_control(rng) + rng.pick(WORDS) + some_control(rng) * (1 + rng.below(3))
    if kind == 14:
        return random_letters(rng)
    if kind == 15:
        return rng.pick(SPECIAL) + rng.pick(["", " ", "user"]) + rng.pick(WORDS) + rng.pick(SPECIAL)
    if kind == 16:
        return any_sentence(rng) + rng.pick(SPACES) + any_sentence(rng)
    return mixed(rng)


def main():
    rng = Rng(SEED)
    lines, seen = [""], {""}
    for i in range(1, LINES):
        text = line(rng, i)
        while text in seen:  # no line twice: a known one goes on with another of its kind
            text += rng.pick(SPACES) + line(rng, i)
        seen.add(text)
        lines.append(text)
    assert len(seen) == LINES and not any("\n" in text for text in lines)
    data = "".join(text + "\n" for text in lines).encode("utf-8")
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("varied_lines.txt")
    path.write_bytes(data)
    print(f"{path}: {LINES} lines, {len(data)} bytes, seed {SEED}")


if __name__ == "__main__":
    main()
