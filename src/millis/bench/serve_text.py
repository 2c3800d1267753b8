"""Prompts for a load: text of so many words, each different, the same for the same seed."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

from millis.types import RequestError

TEXT_LIMIT = 64 << 20  # bytes of a text file
WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")  # a Chinese character, or what stands between spaces
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")

ENGLISH = """
I ordered a replacement card last Tuesday, and the tracking page still says that it has not left the warehouse.
Could you tell me whether the transfer to my landlord went through before the weekend?
The bus on line twelve now stops in front of the library instead of the old market hall.
My daughter has had a mild fever since yesterday evening, but she is drinking well and sleeps most of the time.
The committee agreed to postpone the decision until the engineers have measured the bridge again.
Rain is expected in the north by noon, with strong gusts along the coast and a little snow above nine hundred metres.
When the payment failed for the third time, the shop suggested that I call my bank.
A lane is closed behind the tunnel, and traffic backs up for about four kilometres.
The museum opens at ten, but groups of more than fifteen people have to register two days earlier.
Her report compares the harvests of the last eight years and warns of a shortage of seed potatoes.
I was charged a fee for withdrawing cash abroad although my account is supposed to include it.
The old mill was turned into flats, yet its wheel still turns in the river on market days.
Please explain in plain words what a standing order is and how I can cancel one.
Nobody had noticed that the clock in the station hall was seven minutes slow.
After the update, the telephone no longer connects to the car, and the manual is of no help.
The school bought forty used laptops and lets pupils take them home over the holidays.
He promised to return the key by Friday, so we left the gate unlocked for the gardener.
A small bakery in the side street sells bread that is still warm at six in the morning.
The verification code arrives too late, and by then the page asks me to start all over again.
Two of the four pumps were replaced last spring, and the remaining ones are due in autumn.
If the parcel is refused at the door, it goes back to the sender at our expense.
The city wants to plant three hundred lime trees along the ring road within the next two years.
I would like to raise the limit of my credit card for a trip in September.
The nurse wrote down the time of each dose and asked us to call if the rash spreads.
Visitors praised the quiet garden, the clear signs, and the patience of the guides.
His first novel sold badly, but readers found it again when the second one won a prize.
The exchange rate shown in the app differs from the one on my statement.
A cyclist was slightly hurt when a van turned without signalling at the crossing.
The lecture explains why ships float, and it ends with an experiment that always fails.
We moved last month, and I need to change my address and the name on the contract.
The fire brigade was at the scene within six minutes and could save most of the archive.
Sales of electric delivery vans doubled, while those of diesel lorries fell by a tenth.
Can I pay a friend directly with her telephone number, and does it cost anything?
The mountain railway runs every half hour until sunset, weather permitting.
A leaking pipe in the cellar was found only because the water bill had tripled.
The translator kept the jokes and replaced the puns with better ones.
""".strip().splitlines()
CHINESE = """
我上周二申请了一张新的银行卡，可是物流页面一直显示还没有发货。
请问我转给房东的那笔钱在周末之前到账了吗？
十二路公交车现在改在图书馆门口停靠，不再经过老市场。
孩子从昨天晚上开始有点低烧，不过喝水正常，大部分时间都在睡觉。
委员会决定等工程师重新测量大桥之后再讨论这个问题。
预计中午前后北部地区有雨，沿海风力较大，山区可能有小雪。
付款第三次失败以后，商店建议我联系银行客服。
隧道出口有一条车道封闭，后方车辆排队大约四公里。
博物馆上午十点开门，十五人以上的团体需要提前两天预约。
她的报告比较了过去八年的收成，并提醒明年种子可能不足。
我在国外取现被收了手续费，可是我的账户应该是免费的。
旧磨坊改成了公寓，但是赶集的日子水车仍然在河里转动。
请用简单的话解释什么是定期转账，以及怎样取消。
没有人注意到车站大厅里的钟慢了七分钟。
系统升级以后，手机再也连不上汽车，说明书也帮不上忙。
学校买了四十台二手电脑，假期里学生可以带回家使用。
他答应星期五之前归还钥匙，所以我们没有锁院子的门。
小巷里的面包店早上六点就有刚出炉的热面包。
验证码来得太晚，等收到的时候页面已经要求重新开始。
四台水泵中有两台去年春天已经更换，其余的计划在秋天更换。
如果收件人拒收，包裹会由我们付费退回给寄件人。
市里计划两年内沿环路种植三百棵树。
九月份要去旅行，我想提高信用卡的额度。
护士记下了每次用药的时间，并让我们在皮疹扩散时打电话。
游客称赞花园安静，指示清楚，讲解员也很有耐心。
应用里显示的汇率和账单上的不一样，这是为什么？
一辆货车转弯时没有打灯，路口的骑车人受了轻伤。
我们上个月搬家了，需要修改合同上的地址和姓名。
消防队六分钟内赶到现场，保住了大部分档案。
电动货车的销量翻了一番，柴油卡车的销量下降了一成。
""".strip().splitlines()
LANGUAGES = ("en", "zh", "both")


class Text:
    """Sentences to draw prompts from."""

    def __init__(self, sentences: list[str], chinese: bool = False) -> None:
        self._sentences = sentences
        self._opening = "工单 {}。" if chinese else "Case {}."

    @staticmethod
    def builtin(language: str) -> Text:
        """`en`, `zh` or `both`."""
        sentences = {"en": ENGLISH, "zh": CHINESE, "both": ENGLISH + CHINESE}[language]
        return Text(sentences, chinese=language == "zh")

    @staticmethod
    def of_file(path: Path) -> Text:
        """Sentences of a text file. RequestError if there are none."""
        if path.stat().st_size > TEXT_LIMIT:
            raise RequestError(f"{path} is larger than {TEXT_LIMIT >> 20} MiB; cut it")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise RequestError(f"{path} is not UTF-8 text") from None
        sentences = [" ".join(part.split()) for part in SENTENCE.split(text) if WORD.search(part)]
        if not sentences:
            raise RequestError(f"{path} has no words")
        return Text(sentences)

    def prompt(self, words: int, seed: str, number: int | None) -> str:
        """Exactly `words` words. `number` stands at the beginning, so that no two prompts have a prefix in common;
        None: it does not."""
        rng = random.Random(f"{seed} {number}")
        first = 1000 * random.Random(seed).randrange(10_000, 90_000)
        size = len(self._sentences)
        parts = [] if number is None else [self._opening.format(first + number)]
        found = sum(len(WORD.findall(part)) for part in parts)
        at = rng.randrange(size)
        stride = next(step for step in iter(lambda: rng.randint(1, size), 0) if math.gcd(step, size) == 1)
        while found < words:  # every sentence once before any comes again
            parts.append(self._sentences[at])
            found += len(WORD.findall(self._sentences[at]))
            at = (at + stride) % size
        text = " ".join(parts)
        return text[: [match.end() for match in WORD.finditer(text)][words - 1]]
