"""Documents of a bank, few and short, that tests ask questions of."""

DOCUMENTS = [
    {
        "id": "fees",
        "title": "Blue Account fees",
        "text": "# Fees\n- Monthly fee: $5.00\n- Overdraft fee: $12.50 an item",
    },
    {"id": "limits", "title": "Limits of cards", "text": "You can take up to $400 a day out of a cash machine."},
    {"id": "card", "title": "Lost cards", "text": "A lost card is replaced in 3 days. A courier brings it."},
    {"id": "zh", "title": "信用卡年费", "text": "金卡的年费是三百元。\n普通卡没有年费。"},
]
