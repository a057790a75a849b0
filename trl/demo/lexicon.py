"""The vocabulary and the sentence templates of the demo's film reviews: a context-free grammar, written as data.

    GRAMMAR[symbol] = alternatives;  an alternative is text with slots:  "{title} is a {genre} about {hero}."

Articles are written as `a` and become `an` before a vowel sound. Pairs such as `is/are` in a predicate are the singular
and the plural form. `_good` and `_bad` mark the sentiment. In templates, `pro` is the sentiment of the review and `con`
the opposite one, so that one template serves both: "although {con}, {pro}".

Opening sentences are neutral: a review cut after its first words may continue with either sentiment.
"""

from __future__ import annotations

import re

# subjects in the singular, subjects in the plural, predicates that praise, predicates that blame
ASPECTS: dict[str, tuple[str, str, str, str]] = {
    "acting": (
        "the acting | {actor} | the lead performance | the whole ensemble",
        "the performances | the two leads | the supporting players",
        "carries/carry every scene | finds/find real feeling in small gestures | is/are warm and precise"
        " | gives/give the story its pulse | rings/ring true from start to finish | holds/hold the screen with ease"
        " | brings/bring wit and ache to every line",
        "is/are stiff and distant | never convinces/convince | seems/seem lost from the first scene"
        " | barely registers/register | goes/go through the motions | strikes/strike one sour note after another"
        " | is/are painfully wooden",
    ),
    "script": (
        "the script | the dialogue | the writing | the screenplay",
        "the conversations | the speeches",
        "sparkles/sparkle | is/are sharp and generous | trusts/trust the audience | crackles/crackle with wit"
        " | says/say a great deal in few words | is/are honest and quotable | earns/earn every laugh and every tear",
        "is/are flat and obvious | explains/explain everything twice | leans/lean on borrowed ideas"
        " | sounds/sound like a first draft | mistakes/mistake volume for wit | is/are clumsy and thin"
        " | runs/run out of ideas early",
    ),
    "pacing": (
        "the pacing | the first act | the middle stretch | the second half | the editing",
        "the chase scenes | the early scenes | the long takes",
        "never wastes/waste a minute | builds/build tension with care | moves/move with real confidence"
        " | is/are brisk and exact | keeps/keep the tension high | grips/grip like a vise | flows/flow beautifully",
        "drags/drag | is/are slow and shapeless | wanders/wander in circles | stalls/stall again and again"
        " | crawls/crawl along | kills/kill all suspense | tries/try the patience",
    ),
    "score": (
        "the score | the music | the soundtrack",
        "the songs | the piano themes",
        "lingers/linger for days | lifts/lift every scene | is/are haunting and lovely"
        " | does/do half the storytelling | swells/swell at just the right moments"
        " | gives/give the quiet scenes a heartbeat",
        "drowns/drown every quiet moment | is/are loud and syrupy | grates/grate within minutes"
        " | smothers/smother the drama | is/are instantly forgettable | repeats/repeat until it hurts",
    ),
    "photography": (
        "the photography | the camera work | the lighting | the cinematography",
        "the images | the wide shots | the night scenes",
        "is/are breathtaking | turns/turn plain rooms into paintings | makes/make the landscape a character"
        " | finds/find beauty in every corner | is/are crisp and painterly | glows/glow from within"
        " | rewards/reward the biggest screen",
        "is/are murky and dull | makes/make every place look the same | looks/look cheap"
        " | gives/give the eye nothing to hold | is/are a gray blur | hides/hide the action"
        " | looks/look like a car commercial",
    ),
    "ending": (
        "the ending | the final act | the last twist | the finale | the last scene",
        "the closing minutes | the final scenes",
        "lands/land perfectly | pays/pay off in full | moved/moved me to tears | is/are earned and surprising"
        " | left/left me smiling | ties/tie every thread together | took/took my breath away",
        "makes/make no sense | falls/fall apart | cheats/cheat the audience | is/are rushed and silly"
        " | throws/throw it all away | comes/come out of nowhere | left/left me cold",
    ),
    "direction": (
        "{director} | the director",
        "",
        "shows/show a sure hand | keeps/keep every thread in view | finds/find humor in the darkest corners"
        " | stages/stage each scene with care | knows/know exactly when to hold back"
        " | balances/balance laughter and dread | takes/take risks that pay off",
        "loses/lose control early | mistakes/mistake confusion for depth | piles/pile one gimmick on another"
        " | never settles/settle on a tone | has/have no feel for suspense | lets/let every scene run too long"
        " | seems/seem unsure what story to tell",
    ),
    "characters": (
        "the main character | the villain | the central couple",
        "the characters | the minor characters | the friends and rivals",
        "feels/feel fully alive | has/have depth to spare | is/are drawn with affection"
        " | grows/grow richer by the minute | surprises/surprise at every turn | is/are impossible to forget",
        "is/are made of cardboard | is/are impossible to believe | never comes/come to life | has/have no inner life"
        " | changes/change for no reason | is/are hard to care about",
    ),
    "story": (
        "the story | the plot | the central mystery",
        "the twists | the subplots",
        "is/are clever and humane | keeps/keep you guessing | deepens/deepen with every scene"
        " | never takes/take the easy road | is/are a pleasure to follow | fits/fit together like a puzzle"
        " | has/have real stakes",
        "is/are thin and predictable | collapses/collapse halfway through | is/are recycled from better films"
        " | can/can be guessed in ten minutes | adds/add up to nothing | is/are a tangled mess | loses/lose all steam",
    ),
    "humor": (
        "the humor | the comic relief | the wordplay",
        "the jokes | the comic scenes",
        "is/are sly and warm | had/had the whole row laughing | bites/bite in all the right places"
        " | comes/come from character | never feels/feel forced | lightens/lighten the mood with grace",
        "is/are mean and stale | died/died in silence around me | stops/stop the film cold"
        " | is/are desperate | never rises/rise above a groan | embarrasses/embarrass everyone involved",
    ),
    "design": (
        "the production design | the period detail | the world-building",
        "the costumes | the sets | the effects",
        "is/are rich and lived in | is/are gorgeous | feels/feel lovingly made | is/are worth the ticket alone"
        " | draws/draw you in at once | dazzles/dazzle without showing off",
        "is/are cheap and plastic | looks/look unfinished | distracts/distract from everything else"
        " | belongs/belong in a school play | is/are sloppy | pulls/pull you out of the story",
    ),
}

_PREMISE = {
    "first": "Ada | Boris | Clara | Dario | Edith | Felix | Greta | Hugo | Ines | Jonah | Keiko | Leo | Mara | Nadia"
    " | Odile | Pavel | Rosa | Samir | Tessa | Viktor | Wanda | Yusuf",
    "last": "Ashdown | Bellweather | Corvane | Dunmore | Eklund | Galloway | Hartnell | Ibarra | Jessop | Kestrel"
    " | Lorimer | Mendel | Northcott | Orsini | Pellegrin | Quill | Sandoval | Tremaine | Ulrich | Wexford | Yarrow"
    " | Zeller",
    "director": "{first} {last}",
    "actor": "{first} {last}",
    "title": "The {title_adjective} {title_noun} | {title_adjective} {title_noun} | The {title_noun} at {town}"
    " | {count} Days in {town} | Letters from {town} | A {title_noun} in {season} | The {title_noun} and the {title_noun}"
    " | {season} in {town} | Beyond the {title_noun}",
    "title_adjective": "Silent | Crooked | Northern | Paper | Glass | Borrowed | Second | Burning | Midnight | Painted"
    " | Iron | Distant | Salt | Unwritten | Eastern | Copper",
    "title_noun": "Harbor | Orchard | Lantern | River | Clockmaker | Bridge | Garden | Letter | Station | Island | Tide"
    " | Ferry | Archive | Compass | Sparrow | Window | Mountain | Witness | Anchor | Carousel",
    "town": "Calder | Venning | Port Ames | Marrow Creek | Oldham Bay | Saint Orrin | Tilbury | Halloway | Elmsford",
    "season": "Winter | Autumn | April | August | November",
    "count": "Three | Five | Seven | Nine | Eleven | Forty",
    "genre": "heist film | courtroom drama | western | ghost story | romantic comedy | road movie | spy thriller"
    " | coming-of-age drama | musical | war film | science-fiction thriller | detective story | sports drama"
    " | family comedy | period romance | disaster film | monster movie | political satire | prison drama"
    " | action movie | animated film | island adventure",
    "hero": "a {trait} {job} | a {trait} {job} | a {job} | the {relative} of a {job}",
    "trait": "retired | young | widowed | small-town | former | night-shift | traveling | aging | self-taught"
    " | out-of-work | stubborn | shy | restless | homesick",
    "job": "locksmith | nurse | piano tuner | lawyer | lighthouse keeper | baker | cartographer | boxer | translator"
    " | farmer | detective | schoolteacher | pilot | watchmaker | reporter | sailor | gardener | engineer | singer"
    " | taxi driver | librarian | astronaut | beekeeper | chess player | actor | soldier | electrician | innkeeper",
    "relative": "daughter | son | sister | brother | mother | father | cousin | neighbor",
    "action": "inherits {thing} | finds {thing} {spot} | agrees to one last job | returns home after {years}"
    " | searches for a missing {relative} | hides a stranger from the police | witnesses a crime and says nothing"
    " | takes a train across the continent | opens a diner on the edge of town | is mistaken for a {job}"
    " | steals {thing} from a {job} | wakes up in {place} | moves to {place} | crosses the desert with {thing}"
    " | must defend {place} | writes to a {relative} after {years} | loses a bet to a {job}"
    " | travels to {place} to find a {relative} | learns to live beside a {job} | is hired to guard {thing}"
    " | trades {thing} for a second chance | leaves the city for {place} | gets a call from a {relative}",
    "thing": "a map | a suitcase | a violin | a old letter | a sailboat | a dog | a key | a racehorse | a painting"
    " | a box of photographs | a broken radio | a diary | a stolen car | a hotel",
    "spot": "in the attic | in a dead man's coat | at the bottom of a lake | in a secondhand piano | behind a church wall"
    " | in a locker at the station | in the trunk of a taxi",
    "years": "ten years | twenty years | a long war | a decade at sea | half a lifetime | a year in prison",
    "place": "a fishing village | a mining town | a mountain hotel | a border town | a space station | a island prison"
    " | a boarding school | a desert outpost | a river valley | a city under siege | a small theater | a northern port"
    " | a company town | a abandoned farm",
    "topic": "two sisters and a debt | a missing ship | a trial that divides a town | the last days of a circus"
    " | a marriage between rivals | the price of a secret | a team that nobody wants | a village waiting for rain"
    " | three strangers and a storm | a strike at a factory | a promise made in wartime | the making of a bridge",
    "occasion": "on a rainy Sunday | at a late screening | with my sister | at a small festival | on a long flight"
    " | with a full house | at the old theater downtown | in a nearly empty hall | with two friends | after work",
    "ordinal": "second | third | fourth | fifth | latest | new",
    "opening": "{title} is a {genre} about {hero} who {action}."
    " | In {title}, {hero} {action}."
    " | {director}'s {ordinal} film, {title}, follows {hero} who {action}."
    " | {title}, a {genre} set in {place}, stars {actor} as {hero}."
    " | {actor} plays {hero} who {action} in {title}, a {genre} by {director}."
    " | Set in {place}, {title} follows {hero} who {action}."
    " | {director} directs {actor} in {title}, a {genre} about {topic}."
    " | I saw {title}, a {genre} about {topic}, {occasion}."
    " | We watched {title}, the {ordinal} {genre} from {director}, {occasion}."
    " | {title} stars {actor} as {hero} who {action}."
    " | At the center of {title}, a {genre} by {director}, is {hero} who {action}."
    " | The {genre} {title} begins when {hero} {action}."
    " | This {genre} about {topic} was shot in {town} by {director}."
    " | {title} tells the story of {hero} who {action}.",
}

_SENTIMENT = {
    "adjective_good": "superb | graceful | clever | vivid | tender | assured | luminous | spirited | inventive | charming"
    " | elegant | gripping | heartfelt | witty | exquisite | refreshing | delightful | absorbing | masterful | radiant",
    "adjective_bad": "clumsy | lifeless | tired | hollow | leaden | muddled | lazy | drab | tedious | bland | awkward"
    " | dreary | stale | pointless | tiresome | shallow | dull | careless | dismal | grating",
    "noun_good": "charm | craft | wit | warmth | energy | style | heart | intelligence | beauty | imagination | grace",
    "noun_bad": "excess | noise | bluster | repetition | vanity | gloom | sentimentality | clutter",
    "part": "opening reel | final hour | love story | staging | premise | voice-over | prologue | atmosphere"
    " | middle hour | flashback",
    "reaction_good": "delight | relief | joy | satisfaction",
    "reaction_bad": "dismay | regret | frustration | annoyance",
    "mood_good": "grinning | moved | thrilled | lighter than air | deeply grateful | full of hope | humming | wide awake",
    "mood_bad": "annoyed | numb | disappointed | half asleep | slightly angry | exhausted | unmoved | confused",
    "audience": "fans of {genres} | families | patient viewers | younger viewers | late-night crowds | film students"
    " | anyone who grew up on {genres} | people who rarely like {genres}",
    "fate_good": "find plenty to enjoy | want to see it twice | leave happy | be charmed | thank their friends for it"
    " | fall for it at once | treasure it | cheer at the end",
    "fate_bad": "want their money back | leave early | struggle to stay awake | be bored | regret the ticket"
    " | wonder what went wrong | shrug it off | roll their eyes",
    "confidant": "my whole family | everyone at work | my neighbors | two old friends | anyone who will listen",
    "verdict_good": "I would gladly watch it again tomorrow | {audience} will {fate_good} | I walked out {mood_good}"
    " | two hours have rarely passed so quickly | few {genres} are this {adjective_good}"
    " | I loved almost every minute | this is {director} at full strength | it deserves every prize it gets"
    " | my {relative} and I clapped as the lights came up | it earns a place among the great {genres}"
    " | I left the theater {mood_good} | I have already told {confidant} to go",
    "verdict_bad": "I would not sit through it again for money | {audience} will {fate_bad} | I walked out {mood_bad}"
    " | two hours have rarely passed so slowly | few {genres} are this {adjective_bad}"
    " | I checked my watch every ten minutes | this is {director} on autopilot | it deserves to be forgotten"
    " | my {relative} fell asleep before the end | it sinks to the bottom of a long list of {genres}"
    " | I left the theater {mood_bad} | I have already warned {confidant} to stay away",
    "call_good": "see it on the biggest screen you can find | do not miss it | count me as a believer | take {confidant}"
    " | a {adjective_good} and {adjective_good} piece of work | what a {adjective_good} surprise | bring tissues and go",
    "call_bad": "save your evening for something else | skip it | count me out | warn {confidant}"
    " | a {adjective_bad} and {adjective_bad} waste of talent | what a {adjective_bad} letdown | read a book instead",
    "remark_good": "it is never {adjective_bad} | not one scene feels {adjective_bad}"
    " | there is nothing {adjective_bad} about the {part} | it is far better than the trailer suggests"
    " | it turns a {adjective_bad} idea into something {adjective_good} | it avoids the {noun_bad} of most {genres}"
    " | {director} has never made anything so {adjective_good} | it has {noun_good} and {noun_good} to spare",
    "remark_bad": "it is never {adjective_good} | not one scene feels {adjective_good}"
    " | there is nothing {adjective_good} about the {part} | it is far worse than the trailer suggests"
    " | it turns a {adjective_good} idea into something {adjective_bad} | it has none of the {noun_good} of older {genres}"
    " | {director} has never made anything so {adjective_bad} | it confuses {noun_bad} with {noun_good}",
    "emphasis_good": "best of all | better still | to my {reaction_good}",
    "emphasis_bad": "worst of all | worse still | to my {reaction_bad}",
}

# `pro` and `con` alone are a clause about one aspect: "the script sparkles"
_SKELETONS = {
    "evidence": "{pro}. | {pro}, and {pro}. | {pro}, {pro}, and {pro}. | {pro}; {remark_pro}. | {remark_pro}, and {pro}."
    " | what stays with me is the {adjective_pro} {part}, and {pro}. | the {part} is {adjective_pro}, and {pro}."
    " | from the {adjective_pro} {part} to the {adjective_pro} {part}, this is a {adjective_pro} {genre}."
    " | thanks to the {adjective_pro} {part}, {remark_pro}.",
    "more": "{emphasis_pro}, {pro}. | {emphasis_pro}, {remark_pro}. | on top of that, {pro}. | {pro}, too."
    " | {pro}, and {remark_pro}. | the {part} is {adjective_pro} as well.",
    "concession": "{con}, but {pro}. | although {con}, {pro}. | while {con}, {pro}, and {remark_pro}."
    " | {con}, yet {remark_pro}. | despite the {adjective_con} {part}, {pro}. | for all its {noun_con}, {remark_pro}."
    " | the {adjective_con} {part} cannot hide the fact that {pro}. | some will say that {con}, but {pro}."
    " | I expected a {adjective_con} {genre}; instead, {pro}. | even if {con}, {remark_pro}."
    " | the {part} may be {adjective_con}, but {pro}.",
    "aside": "{con}. | yes, {con}. | it must be said that {con}. | the {part} is {adjective_con}. | I admit that {con}.",
    "turn": "still, {pro}, and {verdict_pro}. | but {pro}, and {remark_pro}. | even so, {remark_pro}; {verdict_pro}."
    " | none of that matters, because {pro}. | but {pro}, and in the end {verdict_pro}.",
    "verdict": "{verdict_pro}. | in short, {verdict_pro}. | in the end, {verdict_pro}. | {verdict_pro}, and {remark_pro}."
    " | {call_pro}. | {call_pro}.",
}

PLANS = (
    ("evidence", "verdict"),
    ("evidence", "verdict"),
    ("evidence", "verdict"),
    ("evidence", "more"),
    ("evidence", "more"),
    ("evidence", "more"),
    ("evidence", "more", "verdict"),
    ("evidence", "concession"),
    ("concession", "verdict"),
    ("concession", "verdict"),
    ("concession",),
    ("aside", "turn"),
)
"""Sequences of sentences that may follow the opening. In mixed ones, the main clause and the last sentence have the
verdict."""

SIDES = {"positive": {"pro": "good", "con": "bad"}, "negative": {"pro": "bad", "con": "good"}}


def plural(noun: str) -> str:
    """`ghost story` → `ghost stories`, `western` → `westerns`."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def _alternatives(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(" | ")) if text else ()


def _inflect(predicate: str, form: int) -> str:
    """`is/are warm` → `is warm` (form 0) or `are warm` (form 1)."""
    return re.sub(r"(\w+)/(\w+)", lambda pair: pair[form + 1], predicate)


def _clauses(aspect: str) -> dict[str, tuple[str, ...]]:
    """The symbols of one aspect: `acting_good` is a singular or a plural subject with a predicate that agrees."""
    *subjects, good, bad = map(_alternatives, ASPECTS[aspect])
    symbols: dict[str, tuple[str, ...]] = {}
    for form, number in enumerate(("one", "many")):
        if not subjects[form]:
            continue
        symbols[f"{aspect}_{number}"] = subjects[form]
        for side, predicates in (("good", good), ("bad", bad)):
            symbols[f"{aspect}_{number}_{side}"] = tuple(_inflect(p, form) for p in predicates)
            clause = f"{{{aspect}_{number}}} {{{aspect}_{number}_{side}}}"
            symbols[f"{aspect}_{side}"] = (*symbols.get(f"{aspect}_{side}", ()), clause)
    return symbols


def _grammar() -> dict[str, tuple[str, ...]]:
    written = {name: _alternatives(text) for name, text in {**_PREMISE, **_SENTIMENT, **_SKELETONS}.items()}
    clauses = {name: entries for aspect in ASPECTS for name, entries in _clauses(aspect).items()}
    return written | clauses | {"genres": tuple(map(plural, written["genre"]))}


GRAMMAR = _grammar()
