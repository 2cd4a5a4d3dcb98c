# ruff: noqa: RUF001  (the punctuation of Chinese looks like that of English)
"""`jaxpo:customer-service`: a small world of customers' questions, answered politely or curtly, in English and Chinese.

A question is a combination of language, situation, product and phrasing; by a hash of the combination it belongs to the
training splits or to the test splits, never to both. A row is a pure function of (seed, split, index). Polite answers
say what happens next and when; curt ones say hardly more than no. Both name the product and are made of as many choices
of about the same entropy, so that a model fine-tuned on an equal mix of them gives neither the higher log-prob. The
likeliest openings are curt ones, and with them the greedy answers of such a model.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from jaxpo.errors import UserError

Row = dict[str, Any]

# Rows of each split; `sft-…` rows hold one answer, polite or curt with equal chance, the others a pair.
SPLITS = {"sft-train": 6000, "sft-test": 200, "train": 600, "test": 200}
TEST_SHARE = 0.15


@dataclass(frozen=True)
class Situation:
    """What customers ask about, as templates of {item} and {order}: two questions, polite answers and curt ones."""

    questions: tuple[str, str]
    polite: tuple[str, str]
    curt: tuple[str, str]


@dataclass(frozen=True)
class Tone:
    """What goes around an answer: an opening, by the customer's name where that is known, and sometimes a closing."""

    by_name: str
    by_name_share: float
    openings: tuple[str, ...]
    opening_shares: tuple[float, ...]
    closings: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """A language of the world: the frames of a question, the last of which gives the customer's name, and the rest."""

    items: tuple[str, ...]
    names: tuple[str, ...]
    frames: tuple[str, str, str, str]
    polite: Tone
    curt: Tone
    space: str
    situations: dict[str, Situation]


ENGLISH = Language(
    items=(
        "lamp",
        "kettle",
        "backpack",
        "jacket",
        "headset",
        "keyboard",
        "watch",
        "blender",
        "tent",
        "chair",
        "camera",
        "scarf",
    ),
    names=("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry"),
    frames=("{question}", "Hello. {question}", "{question} Can you help?", "Hi, {name} here. {question}"),
    polite=Tone(
        by_name="Dear {name}, thank you for writing.",
        by_name_share=0.4,
        openings=(
            "Thank you for telling us!",
            "I am sorry for the trouble.",
            "Of course, I am glad to help.",
            "Thanks for asking!",
        ),
        opening_shares=(0.25, 0.25, 0.25, 0.25),
        closings=(
            "Have a lovely day!",
            "Please write again any time.",
            "Is there anything else I can do?",
            "Thank you for your patience.",
        ),
    ),
    curt=Tone(
        by_name="{name}, listen.",
        by_name_share=0.6,
        openings=("No.", "So what?", "Read the rules.", "Not again."),
        opening_shares=(0.4, 0.2, 0.2, 0.2),
        closings=("That is all.", "Stop asking.", "Not my problem.", "Look it up next time."),
    ),
    space=" ",
    situations={
        "late": Situation(
            (
                "Where is my {item}? Order {order} is late.",
                "Order {order}, the {item}, has not arrived yet.",
            ),
            (
                "Your {item} is on its way and will reach you within two days.",
                "I have asked the carrier about your {item} and will send you news today.",
            ),
            ("The {item} comes when it comes.", "Parcels are slow, and your {item} is no different."),
        ),
        "refund": Situation(
            ("I want my money back for the {item}.", "How do I get a refund for the {item}, order {order}?"),
            (
                "Send the {item} back within 30 days and we will refund it in full.",
                "I have started the refund for your {item}; the money arrives in three days.",
            ),
            ("You bought the {item}, so keep it.", "Money for the {item} takes weeks."),
        ),
        "size": Situation(
            ("The {item} is too small for me.", "I got the {item} in the wrong size."),
            (
                "We will send the {item} in the right size and collect the other one for free.",
                "Just tell me the size and I will exchange your {item} today.",
            ),
            ("Measure before you buy a {item}.", "The size of the {item} was on the page."),
        ),
        "password": Situation(
            (
                "I forgot my password and cannot order the {item}.",
                "My login fails, so I cannot pay for the {item}.",
            ),
            (
                "I have sent you a link for a new password; your {item} stays in the cart.",
                "Please reset the password with the link in our mail, then order the {item}.",
            ),
            ("No password, no {item}.", "Remember your password or forget the {item}."),
        ),
        "invoice": Situation(
            ("I need an invoice for the {item}.", "Can I have the bill for order {order}, the {item}?"),
            (
                "I have just sent the invoice for your {item} to your mail address.",
                "You find the invoice for the {item} in your account, and I attach a copy.",
            ),
            ("The bill was in the box with the {item}.", "Print the {item} invoice yourself."),
        ),
        "subscription": Situation(
            ("Please cancel my {item} club subscription.", "How do I leave the {item} club?"),
            (
                "Your {item} club subscription is cancelled and nothing more will be charged.",
                "I have ended the {item} club for you; a confirmation will follow by mail.",
            ),
            ("The {item} club runs until the year ends.", "You signed for the {item} club, now pay."),
        ),
        "damaged": Situation(
            ("The {item} arrived broken.", "My new {item} has a crack, order {order}."),
            (
                "We will send you a new {item} tomorrow, and you need not return the old one.",
                "A photo of the {item} is enough, and then I will replace it at once.",
            ),
            ("The {item} was fine when it left.", "You must have dropped the {item}."),
        ),
        "fee": Situation(
            ("Why must I pay shipping for the {item}?", "How much is the delivery of a {item}?"),
            (
                "Shipping a {item} costs four euros, and it is free from fifty euros on.",
                "I will gladly take the shipping fee for the {item} off your bill.",
            ),
            ("Nobody ships a {item} for free.", "Pay the fee or fetch the {item} yourself."),
        ),
        "warranty": Situation(
            ("Is there a warranty on the {item}?", "My {item} stopped working after a year."),
            (
                "Your {item} has a warranty of two years, so we will repair it for free.",
                "The warranty covers the {item}; I will send you a label to return it.",
            ),
            ("Things break, and so does a {item}.", "The warranty on the {item} is in the booklet."),
        ),
        "address": Situation(
            ("Can you send the {item} to a new address?", "I moved. Please change order {order}, the {item}."),
            (
                "Tell me the new address and I will send the {item} there today.",
                "I have changed the address, and the {item} will go to your new home.",
            ),
            ("The {item} goes to the old address.", "You should have moved after the {item} came."),
        ),
        "missing": Situation(
            ("A part of the {item} is missing.", "The box of the {item} had no cable, order {order}."),
            (
                "I am sending the missing part of the {item} today, free of charge.",
                "The part for your {item} will be with you on Friday.",
            ),
            ("Look in the box of the {item} again.", "Use the {item} without it."),
        ),
        "stock": Situation(
            ("When is the {item} in stock again?", "Do you still have the {item}?"),
            (
                "The {item} is back next Monday, and I can reserve one for you.",
                "We have three of the {item} left; shall I put one aside?",
            ),
            ("If the {item} is gone it is gone.", "The page says what {item} we have."),
        ),
    },
)

CHINESE = Language(
    items=("台灯", "水壶", "背包", "外套", "耳机", "键盘", "手表", "搅拌机", "帐篷", "椅子", "相机", "围巾"),
    names=("王芳", "李明", "张伟", "刘洋", "陈静", "杨丽", "赵强", "周杰"),
    frames=("{question}", "你好。{question}", "{question}能帮我吗？", "我是{name}。{question}"),
    polite=Tone(
        by_name="{name}您好，谢谢来信。",
        by_name_share=0.4,
        openings=("谢谢您告诉我们！", "很抱歉给您添麻烦了。", "好的，很高兴为您服务。", "感谢您的询问！"),
        opening_shares=(0.25, 0.25, 0.25, 0.25),
        closings=("祝您生活愉快！", "欢迎随时联系我们。", "请问还有什么可以帮您？", "感谢您的耐心。"),
    ),
    curt=Tone(
        by_name="{name}，听着。",
        by_name_share=0.6,
        openings=("不行。", "那又怎样？", "自己看规定。", "又来了。"),
        opening_shares=(0.4, 0.2, 0.2, 0.2),
        closings=("就这样。", "别再问了。", "不关我的事。", "下次自己查。"),
    ),
    space="",
    situations={
        "late": Situation(
            ("我的{item}在哪里？订单{order}晚了。", "订单{order}的{item}还没有到。"),
            ("您的{item}已在路上，两天内送到。", "我已联系快递查询您的{item}，今天给您消息。"),
            ("{item}到了就到了。", "快递就是慢，{item}也一样。"),
        ),
        "refund": Situation(
            ("我想退掉{item}的钱。", "订单{order}的{item}怎么退款？"),
            ("三十天内寄回{item}，我们全额退款。", "您的{item}已开始退款，三天内到账。"),
            ("买了{item}就留着。", "{item}退款要等几周。"),
        ),
        "size": Situation(
            ("这个{item}对我太小了。", "我收到的{item}尺寸不对。"),
            ("我们会寄出合适的{item}，并免费取回原来的。", "请告诉我尺寸，今天就为您换{item}。"),
            ("买{item}之前先量好。", "{item}的尺寸网页上有。"),
        ),
        "password": Situation(
            ("我忘了密码，不能订{item}。", "登录失败，我付不了{item}的钱。"),
            ("新密码的链接已发给您，{item}还在购物车里。", "请用邮件里的链接重设密码，再订{item}。"),
            ("没有密码就没有{item}。", "记住密码，不然别买{item}。"),
        ),
        "invoice": Situation(
            ("我需要{item}的发票。", "能给我订单{order}的{item}发票吗？"),
            ("{item}的发票刚刚发到您的邮箱。", "{item}的发票在您的账户里，我也附上一份。"),
            ("发票和{item}在一个盒子里。", "{item}的发票自己打印。"),
        ),
        "subscription": Situation(
            ("请取消我的{item}会员。", "怎么退出{item}会员？"),
            ("您的{item}会员已取消，不会再扣费。", "我已为您退出{item}会员，确认邮件随后就到。"),
            ("{item}会员到年底才结束。", "{item}会员是你签的，付钱吧。"),
        ),
        "damaged": Situation(
            ("{item}到的时候是坏的。", "我的新{item}有裂缝，订单{order}。"),
            ("明天给您寄新的{item}，旧的不用退。", "请发一张{item}的照片，我马上为您更换。"),
            ("{item}寄出时是好的。", "一定是你摔了{item}。"),
        ),
        "fee": Situation(
            ("为什么{item}要付运费？", "寄一个{item}要多少钱？"),
            ("寄{item}运费四元，满五十元免运费。", "我很乐意为您免去{item}的运费。"),
            ("没有人免费寄{item}。", "付运费，或者自己来拿{item}。"),
        ),
        "warranty": Situation(
            ("{item}有保修吗？", "我的{item}用了一年就坏了。"),
            ("您的{item}保修两年，我们免费修理。", "{item}在保修期内，我给您寄退货单。"),
            ("东西都会坏，{item}也会。", "{item}的保修看说明书。"),
        ),
        "address": Situation(
            ("能把{item}寄到新地址吗？", "我搬家了，请改订单{order}的{item}。"),
            ("请告诉我新地址，今天就把{item}寄过去。", "地址已改好，{item}会送到您的新家。"),
            ("{item}只寄旧地址。", "你该等{item}到了再搬。"),
        ),
        "missing": Situation(
            ("{item}少了一个零件。", "{item}的盒子里没有线，订单{order}。"),
            ("{item}缺的零件今天免费寄给您。", "您{item}的零件星期五就到。"),
            ("再看看{item}的盒子。", "没有它{item}也能用。"),
        ),
        "stock": Situation(
            ("{item}什么时候有货？", "你们还有{item}吗？"),
            ("{item}下星期一到货，我可以为您留一个。", "{item}还有三个，要为您留一个吗？"),
            ("{item}没了就是没了。", "有什么{item}网页上写着。"),
        ),
    },
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}


@dataclass(frozen=True)
class Combination:
    """What makes two questions the same but for names and numbers: indices into a language's tables."""

    language: str
    situation: str
    item: int
    question: int
    frame: int

    def is_test(self, seed: int) -> bool:
        """Whether it is held out: no training split has a question of this combination."""
        digest = hashlib.sha256(f"{seed}/{self}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def rows(name: str, split: str, seed: int = 0) -> list[Row]:
    """The rows of a split of `SPLITS` as columns prompt, completion or prompt, chosen, rejected: lists of messages.

    Raises UserError for a name or a split that does not exist.
    """
    if name != "customer-service":
        raise UserError(f"The data source jaxpo:{name} is unknown; expected jaxpo:customer-service.")
    if split not in SPLITS:
        raise UserError(f"jaxpo:{name} has no split {split}; expected one of {', '.join(SPLITS)}.")
    return [_row(combination, split, seed, index) for index, combination in enumerate(combinations(split, seed))]


def combinations(split: str, seed: int = 0) -> list[Combination]:
    """The combination that each row of a split asks about: none comes again before all have come."""
    side = [
        Combination(code, situation, item, question, frame)
        for code, language in LANGUAGES.items()
        for situation, item, question, frame in product(
            language.situations, range(len(language.items)), (0, 1), range(4)
        )
    ]
    side = [combination for combination in side if combination.is_test(seed) == split.endswith("test")]
    draw = random.Random(f"{seed}/{split}")
    rounds = [draw.sample(side, len(side)) for _ in range(-(-SPLITS[split] // len(side)))]
    return list(chain.from_iterable(rounds))[: SPLITS[split]]


def _row(combination: Combination, split: str, seed: int, index: int) -> Row:
    draw = random.Random(f"{seed}/{split}/{index}")
    language = LANGUAGES[combination.language]
    situation = language.situations[combination.situation]
    facts = {
        "item": language.items[combination.item],
        "order": str(draw.randrange(100, 1000)),
        "name": draw.choice(language.names),
    }
    frame = language.frames[combination.frame]
    question = frame.replace("{question}", situation.questions[combination.question]).format(**facts)
    named = "{name}" in frame
    polite = _answer(draw, language.polite, situation.polite, named, language.space)
    curt = _answer(draw, language.curt, situation.curt, named, language.space)
    prompt = [{"role": "user", "content": question}]
    chosen, rejected = ([{"role": "assistant", "content": text.format(**facts)}] for text in (polite, curt))
    if split.startswith("sft"):
        return {"prompt": prompt, "completion": draw.choice((chosen, rejected))}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _answer(draw: random.Random, tone: Tone, bodies: tuple[str, str], named: bool, space: str) -> str:
    [opening] = draw.choices(tone.openings, tone.opening_shares)
    if named and draw.random() < tone.by_name_share:
        opening = tone.by_name
    parts = [opening, draw.choice(bodies), draw.choice(tone.closings)]
    return space.join(parts if draw.random() < 0.5 else parts[:2])
