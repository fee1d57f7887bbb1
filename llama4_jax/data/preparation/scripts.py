"""The scripts that are told apart, each by a letter of it: ICU numbers scripts, and the letter's number is its script's."""

from __future__ import annotations

LETTERS = {
    **{"Latin": "a", "Greek": "α", "Cyrillic": "б", "Armenian": "ա", "Hebrew": "א", "Arabic": "ب", "Devanagari": "क"},
    **{"Bengali": "ক", "Tamil": "க", "Telugu": "క", "Thai": "ก", "Georgian": "ა", "Hangul": "가", "Hiragana": "あ"},
    **{"Katakana": "ア", "Han": "中", "Khmer": "ក", "Ethiopic": "አ"},
}
OTHER = "other"
NAMES = (*LETTERS, OTHER)
