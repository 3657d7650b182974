"""The phrases and values that `make_tasks.py` puts rows together from; each pool is cut `train // dev // test`."""

from __future__ import annotations

import re

ROWS = {"train": 600, "dev": 80, "test": 120}

Pool = dict[str, list[str]]
"""share (train, dev, test) -> phrases or values of that share"""


def _shares(text: str) -> Pool:
    """Cut `train // dev // test` into a pool; phrases stand one per line."""
    shares = [[item.strip() for item in share.splitlines() if item.strip()] for share in text.split("//")]
    return dict(zip(ROWS, shares, strict=True))


def _words(text: str) -> Pool:
    """The same for short values, which stand with a comma and white space between them."""
    return _shares(re.sub(r",\s+", "\n", text))


def _numbers(low: int, high: int, form: str = "{}") -> Pool:
    """Numbers from `low` up to `high`, written in `form`; those with remainder 0 or 1 by 4 are train, 2 dev, 3 test."""
    remainders = {"train": (0, 1), "dev": (2,), "test": (3,)}
    return {split: [form.format(n) for n in range(low, high) if n % 4 in remainders[split]] for split in ROWS}


def _same(*items: str) -> Pool:
    """A closed set: every share has all of it."""
    return {split: list(items) for split in ROWS}


VALUES: dict[str, Pool] = {
    "amount": _numbers(12, 480, "${}"),
    "cents": _numbers(6, 95, "${}.50"),
    "order": _numbers(20311, 89740),
    "count": _numbers(6, 90),
    "year": _numbers(2003, 2024),
    "sum": _numbers(4, 400, "${},000"),
    "section": _numbers(2, 30),
    "percent": _numbers(2, 19, "{} percent"),
    "tens": _numbers(3, 99),
    "length": _numbers(3, 95),
    "few": _numbers(2, 20),
    "term": _numbers(2, 10),
    "name": _words("""Priya, Tom, Aisha, Marek, Helen, Luca, Grace, Omar, Ingrid, Sam, Mei, Paul, Nadia, Felix, Ruth,
        Jonas, Carla, Ben, Yusuf, Anna, Victor, Dora // Elena, Kofi, Maeve, Hugo, Tessa // Bruno, Amara, Stefan, Lily,
        Rashid, Noor, Walter"""),
    "surname": _words("""Hill, Stone, Turner, Baker, Carter, Norton, Foster, Graham, Evans, Ward, Reed, Marsh, Cole,
        Shaw, Webb, Price, Doyle, Flynn, Berg, Novak, Costa, Silva // Brook, Mason, Palmer, Lund // Hughes, Lawson,
        Field, Dean, Moreno, Frost"""),
    "unit": _words("""finance, site, branch, area, night, works, store, field, garden, travel, school, plant, music,
        team, kitchen, health // safety, cargo, library // office, harbour, press, court, project"""),
    "rank": _same("manager", "officer", "clerk", "director", "leader", "chief", "nurse", "secretary"),
    "letter": _same(*"ABCDEFGHKLMNPRSTVW"),
    "item": _words("""kettle, desk lamp, rain jacket, backpack, phone case, coffee grinder, road bike, garden chair,
        blender, tent, wool blanket, keyboard, office chair, winter coat, water bottle, bookcase // yoga mat, suitcase,
        toaster, picture frame // sleeping bag, rice cooker, floor lamp, camera strap, umbrella, step ladder"""),
    "plan": _words("Basic, Team, Family, Pro, Student, Starter // Plus, Silver // Premium, Studio, Gold"),
    "app": _words("""app, web shop, phone app, dashboard, booking page, site // tablet app, desktop app
        // customer portal, mobile site"""),
    "day": _same("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "month": _same("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
        "November", "December"),
    "city": _words("""Leeds, Oslo, Lisbon, Denver, Boston, Berlin, Bristol, York, Vienna, Hull, Seattle, Geneva,
        Athens, Toronto, Warsaw, Bath, Bergen, Brussels, Lima, Kyoto, Porto, Perth, Houston, Boise, Tampa, Reno, Derby,
        Dundee, Exeter, Oxford, Ghent, Bonn, Dresden, Turin, Venice, Malta, Riga, Sofia, Salem, Albany, Omaha, Tucson,
        Memphis, Hanoi, Manila, Munich, Zurich, Naples, Dover, Cambridge, Sydney, Montreal // Dallas, Milan, Lyon,
        Cork, Paris, Delhi, Dublin // London, Rome, Chicago, Prague, Austin, Tokyo, Quito, Cairo, Madrid, Cardiff,
        Havana"""),
    "days": _words("""3 days, 5 days, 10 days, 14 days, 20 days, 30 days, 60 days, two weeks // 7 days, 21 days,
        28 days // 12 days, 15 days, 45 days, 90 days, six weeks"""),
    "state": _words("""Delaware, New York, England and Wales, Ontario, Texas, the State of Ohio, Ireland,
        the State of Nevada, Germany, California, New South Wales, Illinois // Scotland, Florida, the State of Utah,
        Norway // Massachusetts, Singapore, Virginia, the State of Oregon, France, Alberta"""),
}  # fmt: skip
"""gap -> its values"""

TRIAGE = {
    "billing": _shares("""
        My card was [charged|billed|debited] [twice|two times|three times] for order {order}, {amount} each time.
        The [invoice|bill] for {month} says {amount}, but we [agreed on|were told] {cents}.
        [Please|Could you] send the {month} invoice again [with our tax number|in our company's name|to our accountant].
        There is a charge of {cents} on my [statement|card] that I [do not recognise|cannot explain].
        I need to [change|update|replace] the card that you [charge|bill] each month for the {plan} plan.
        Why did the [price|fee] on my bill go up to {amount} [since|after] {month}?
        The discount of {amount} is missing from [my|our|the] invoice for the {item}.
        You [charged|billed] us for {count} seats in {month} and that number is wrong on the invoice.
        Our [accountant|bookkeeper] cannot match your invoice of {amount} to any payment.
        Can I pay the bill for order {order} by [bank transfer|cheque|card] [next month|in {month}]?
        The tax on your invoice of {month} [is|seems] wrong.
        We [got|received] two [invoices|bills] for {month}, which one do we pay?
        [Who|Which office] can explain the fee of {cents} on my {month} statement?
        The payment of {amount} for {month} [was taken|left my account] [twice|too early].
        Which [address|name|tax number] do you [print|put] on the bill? Ours [is new|has changed].
        You sent a payment reminder, but I have paid this invoice [on {day}|in {month}].
        //
        The {month} bill has a fee of {cents} that nobody here can explain.
        Can the yearly invoice of {amount} be paid with two cards, please?
        We paid {amount} in {month} and still get a reminder for [that|the same] invoice.
        //
        A second payment of {amount} left my [account|card] for the same invoice.
        The tax on the bill for the {item} looks wrong, it [should be|was] {cents}.
        Your {month} statement lists a charge of {amount} under two [different dates|orders].
        Our name is wrong on the {month} bill, [may|could] we have a new invoice?
        Why is there a monthly charge of {cents} on my card? [My bill was lower|I pay once a year].
        Our accountant asks for every invoice that you billed us for [since|in] {month}.
    """),
    "refund": _shares("""
        I sent the {item} back [on {day}|in {month}] and still [wait for|have not seen] my money.
        [Please|Kindly] refund the {amount} for the {item}, it [does not fit|broke after {days}|is not as described].
        How long does a refund [take|need]? I returned the {item} [on {day}|{days} ago].
        I want my money back for order {order}, the {item} [came broken|is the wrong colour|was a poor copy].
        You promised to [give back|return] the {amount} for the {item}, but nothing has [come|reached my bank].
        The [seller|shop] took the {item} back. When will I be [refunded|paid back] the {amount}?
        Only {cents} of the {amount} refund for my return [arrived|was paid out].
        I would like to return the {item} and get [the {amount} back|a full refund|my money back].
        The return of the {item} was accepted on {day}. Is the refund on its way?
        I am [not happy|unhappy] with the {item}, may I [return it|send it back] for a refund?
        [Please|Could you] pay back the {amount}, I returned the {item} [unused|in its box].
        My refund of {amount} [has not arrived|is missing], the {item} [is back|went back] since {month}.
        A voucher is no use to me, I want [a refund|my money back] for the {item}.
        The {item} [stopped working|fell apart] after {days}, so I [ask for|want] a refund of {amount}.
        Where is the money for [the {item} that I returned|my return of order {order}]?
        //
        You owe me a refund of {amount}: the {item} went back to you {days} ago.
        Can I have my money back for the {item} instead of a voucher?
        My return was accepted, yet the {amount} has not been [paid back|refunded].
        //
        You have the {item} back since {day}, so please [refund|pay back] my {amount}.
        The {item} is a poor copy and I ask for a full refund of [{cents}|{amount}].
        Has the money for my returned {item} been [sent|paid]? My bank sees no refund.
        I do not want a voucher, I want the {amount} for the {item} back [in cash|on my card].
        Your shop accepted my return {days} ago, [when|how] will the refund come?
        It broke, so the {item} went back, and now I am still waiting to be refunded.
    """),
    "shipping": _shares("""
        [Where is|What happened to] my [parcel|package]? Order {order} should have [come|arrived] on {day}.
        The {item} was due {days} ago and the [tracking page|tracking number] [shows nothing|has not moved].
        The [courier|driver] left my [parcel|package] with the [wrong neighbour|wrong house] in {city}.
        Can you [change|correct] the delivery address of order {order} to {city}?
        My {item} [arrived|was delivered] in a [crushed|wet|torn] box and half of the [parcel|package] is missing.
        How much is [delivery|shipping] of a {item} to {city}, and how many days does it take?
        Please [deliver|ship] order {order} after {day}, nobody is [home|in the office] before.
        The [courier|carrier] says the [parcel|package] is stuck [in customs|at the depot in {city}] since {day}.
        You [shipped|sent] a {item} and I [ordered|asked for] something else, please send the right [parcel|one].
        The [tracking|carrier] says delivered, but no [parcel|package] [came|is here].
        Is the {item} on its way to {city} yet? The [delivery|parcel] is {days} late.
        When will [order {order}|the {item}] be [shipped|delivered] to {city}?
        The driver [rang|came] on {day} and took the [parcel|package] away again.
        [Only one|One] of two [boxes|parcels] was delivered, the {item} is still on the road.
        Could the [courier|driver] [deliver|bring] order {order} to [the back door|my neighbour]?
        //
        The tracking says that my package was delivered in {city}, and it was not.
        Could the courier deliver order {order} in the evening of {day}?
        My delivery of the {item} is {days} late, where is the parcel now?
        //
        A driver came on {day}, then went away with my parcel, and the [depot|carrier] knows nothing.
        Has the {item} been shipped to {city} yet? The tracking number is [empty|wrong].
        We moved to {city}, so the package for order {order} must go to the new address.
        Two boxes were shipped and one was delivered, [where is|what about] the {item}?
        The parcel for {city} has not moved from the depot [since {day}|for {days}].
        How many days is a delivery to {city}? The {item} has to [arrive|be here] on {day}.
    """),
    "login": _shares("""
        I [forgot|lost] my password and the reset mail [never comes|does not arrive].
        The {app} says my [user name|password] is wrong [since {day}|after the move to a new phone].
        My account is [locked|blocked] after [three|too many] attempts to [sign in|log in].
        I cannot [log in|sign in] [with my old email|from my new laptop|from {city}] any more.
        The [code|text message] for the second step of the login [never comes|comes too late].
        How do I [change|reset] my password when I no longer have [that email address|the old phone]?
        The {app} [throws me out|signs me out] and asks for my password [every hour|each morning].
        My colleague {name} left, and we need [his|her] user name and password [reset|changed].
        [Please|Could you] unlock my account, I [typed|used] the wrong password on {day}.
        The link to reset my password [has expired|does not open], so I am still locked out.
        [Signing in|Logging in] from {city} fails, the {app} does not [accept|take] my code.
        It [says|keeps telling me] that my email and password do not match.
        I am locked out of [the {app}|my account] [since {day}|again], what is my user name?
        Without the code from my old phone I [do not get|cannot get] into my account.
        The {app} does not let [me|{name}] sign in, [please|could you] reset the login.
        //
        The reset link for my password has expired twice, and I am still locked out.
        Signing in from {city} fails: the {app} says that my code is wrong.
        Which email belongs to my user name? I cannot log in [since {day}|any more].
        //
        It tells me that my email and password do not match, so I cannot get into my account.
        No text message with the code came, and [without it|so] the {app} does not let me sign in.
        Since {day} I am locked out, please reset the [login|password] for user {name}.
        My new phone does not know my password and the {app} asks for it to sign in.
        I typed the wrong code [three times|twice], and now the account is blocked.
        How can {name} log in [without a phone|from {city}]? The reset code never comes.
    """),
    "cancel": _shares("""
        [Please|Kindly] cancel my {plan} [subscription|plan] [at the end of {month}|from {month}].
        I want to [stop|end|close] my {plan} [membership|subscription], we [moved away|do not use it any more].
        How do I [cancel|get out of] the {plan} plan before it renews in {month}?
        [Please|Could you] cancel order {order}, I [bought|ordered] the {item} by mistake.
        We will not [renew|extend] the {plan} contract [after {month}|next year].
        My trial of the {plan} plan [ends on {day}|is nearly over] and I do not want to [continue|go on].
        I no longer need the {item}, so please [stop|cancel] the order before it leaves.
        [Take|Strike] us off the {plan} plan, {month} is our last month.
        I [hereby|herewith] give notice and end my [membership|contract] on the {plan} plan.
        We have closed the office in {city} and [cancel|end] the {plan} [subscription|contract].
        Do not renew my {plan} [membership|plan], I [want|need] to end it [in {month}|now].
        I ordered the {item} twice by mistake, [please|can you] cancel one.
        Is a notice of {days} enough to [end|cancel] the {plan} membership?
        [Please|Kindly] confirm that my {plan} subscription [ends|stops] in {month}.
        We do not use the {plan} plan [any more|enough], how can we cancel it?
        //
        End my {plan} membership, please, I do not wish to renew it in {month}.
        The order for the {item} was a mistake, [can|may] I still cancel it?
        We want to stop the {plan} subscription, is notice of {days} enough?
        //
        We moved away from {city} and no longer need the {plan} subscription, so this is our notice.
        Do not renew my {plan} plan, let it end in {month}.
        Kindly stop order {order}, I ordered the {item} twice by mistake.
        I want to [leave|quit] the {plan} membership and cancel it with notice of {days}.
        The {plan} contract [renews|ends] in {month} and I do not want to go on with it.
        How can we [stop|end] the trial of the {plan} plan before {day}?
    """),
    "bug": _shares("""
        The {app} [crashes|freezes|closes] [when|each time] I open the [search|photo|calendar] page.
        Since the [update|new version] the [save|print|search] button [does nothing|is grey|has gone].
        The {app} shows [an error|error {count}|a blank page] when I [upload|add] a [photo|file].
        The {app} is so slow that the [report|list|map] takes {count} seconds to [load|open].
        The search on the {app} [finds nothing|gives the wrong results] [for|when I type] "{item}".
        [Something|The export] is broken: the {month} report [comes out empty|shows the wrong dates].
        The [map|calendar|chart] on the {app} [is cut off|overlaps the text] on a small screen.
        I get [an error|error {count}] [whenever|every time] I press the [save|send|print] button.
        The {app} does not [sync|load] since {day}, it [hangs|stops] at {count} percent.
        The {app} [froze|crashed] [on {day}|twice] in the middle of a [report|search].
        The file that the {app} exports is [broken|empty] and does not open.
        [After|Since] the update the screen stays [white|black] and the {app} has to be closed.
        The [calendar|report] shows every [meeting|date] [one hour|one day] late.
        The [photos|files|maps] on the {app} do not load, I [see|get] a blank [page|screen].
        A [menu|button] on the {app} does nothing when I press it.
        //
        After the update the {app} hangs on a white screen and has to be closed.
        The report that the {app} exports is broken, the dates are wrong.
        I press the search button and the {app} closes with an error.
        //
        Error {count} comes up in the {app} each time I add a second [photo|file].
        The {app} crashed on {day} in the middle of a report, and [the page|my file] was empty.
        A button in the new version does nothing: I press [print|save], and the page is blank.
        Your calendar shows [the wrong dates|every meeting one day late] since the last update.
        The {app} is slow since the update, a photo takes {count} seconds to load.
        On a small screen the {app} cuts off [the list|the map] and the buttons overlap.
    """),
    "sales": _shares("""
        [Could you|Please] [send|make] us a quote for {count} [{item}s|seats on the {plan} plan].
        What [discount|price] do you offer if we [buy|order] {count} {item}s at once?
        We are [thinking of buying|comparing offers for] the {plan} plan and would like a [demo|call] on {day}.
        Is there a [cheaper price|discount] for [schools|charities|small firms] on the {plan} plan?
        Which plan [is best|do you recommend] for a team of {count} people in {city}?
        Do you have the {item} in [stock|other colours]? We would [buy|take] {count} of them.
        My [boss|manager] {name} wants to know the price of the {plan} plan for {count} people.
        Can someone from [sales|your team] [call|visit] us in {city} about a larger order?
        We [want|plan] to [upgrade|move up] from the {plan} plan, what would {count} more seats cost?
        Our [school|charity|firm] wants to buy {count} {item}s, what is your best [price|offer]?
        How much would {count} seats [cost|be] on the {plan} plan?
        [May|Can] we see a demo of the {plan} plan before we buy it?
        We ask for an offer for {count} [{item}s|more seats], [please|if you can] with a discount.
        How do the {plan} plan and the [large|small] plan compare? We [want to buy|are buying] one.
        Would you [give|offer] a better price if our [shops|schools] buy {count} {item}s?
        //
        Our school wants to buy {count} {item}s, do you offer a discount?
        Can I see a demo of the {plan} plan before we buy it for {count} people?
        What would the {plan} plan cost for a firm of {count}?
        //
        We are a charity in {city} and ask for [an offer|a quote] for {count} {item}s.
        How much would {count} seats cost us if we buy the {plan} plan before {month}?
        Would you give a discount on a [large|larger] order, say {count} {item}s for our shops?
        Before we buy, could someone call {name} and [explain|say] how the plans compare?
        Please let us know your best price for {count} people on the {plan} plan.
        Our manager wants a demo [on {day}|in {city}] and an offer for {count} seats.
    """),
    "privacy": _shares("""
        [Please|Kindly] delete all [personal data|data] that you [hold|store] about me.
        Which [personal data|information] do you [keep|hold|store] about me, and who can see it?
        I want a copy of [my personal data|everything you store about me], as the law [allows|says].
        Do you [share|sell] my [address|phone number|data] [to|with] other companies?
        I did not [agree|consent] to your [newsletter|marketing mails], take me off the [mailing list|list].
        My [photo|phone number|home address] can be seen by [anyone|strangers] on the {app}, please remove it.
        I [withdraw|take back] my consent to the use of my [data|photo] for [advertising|marketing].
        How long do you [keep|store] the [recordings|records] of my calls, and can they be deleted?
        I got a mail with the [address|personal data] of another customer, {name}, this looks like a data leak.
        [Please|Kindly] [erase|remove] my [name|data|phone number] from your records.
        Another company [has|got] my phone number, did you [give|sell] them my data?
        I never gave consent to [share|store] my [data|photo|address], please delete it.
        No more newsletters, please, and [remove|delete] my [name|address] from the mailing list.
        Was my [personal data|address] part of the data leak in {month}?
        I ask for a list of the personal information that you [store|keep] on [me|{name}].
        //
        Erase my personal data from your records, as the law says, and confirm it within {days}.
        Strangers can see my home address on the {app}. Who gave consent to that?
        Do you keep my data after {days}, and which companies do you share it with?
        //
        Another company has my address, and I think that you [gave|sold] them my data.
        I ask for a copy of all the information that is stored on me [or on {name}|since {month}].
        No more marketing, please, and delete my [data|address] from every mailing list.
        Was my data part of the leak in {month}? I never gave consent to [share|keep] it.
        Remove my photo from the {app}, I take back my consent.
        Who can see the [records|recordings] of my calls with {name}, and how long do you store them?
    """),
}

FOLLOWS = {
    "billing": _shares("""
        Please [check|correct] the [invoice|bill].
        Our payment office waits for an answer.
        I will not pay the bill twice.
        Who looks after invoices?
        // Please look at the payment again.
        Send a correct bill, please.
        // Please put the invoice right.
        Can the billing office look at this charge?
        We pay our bills on time.
    """),
    "refund": _shares("""
        I only want my money back.
        Please refund it [soon|this week].
        The receipt for the return is [attached|in the box].
        When does the refund come?
        // Please pay me back soon.
        A refund is all that I ask for.
        // Please send my money back.
        I still have the receipt for the return.
        A full refund is only fair.
    """),
    "shipping": _shares("""
        Please ask the [courier|driver].
        The parcel is needed [this week|on {day}].
        Somebody must know where the package is.
        Please deliver it soon.
        // Please ask the depot about the parcel.
        When is the delivery?
        // Could you ask the courier about it?
        We need the package this week.
        Please find the parcel.
    """),
    "login": _shares("""
        I need to get into my account [today|on {day}].
        Please send a new [password|code].
        Without the login I cannot work.
        Please unlock the account.
        // Please reset the password today.
        I must log in this week.
        // Please let me into my account.
        A new code or password would help.
        I need to sign in for my work.
    """),
    "cancel": _shares("""
        Please confirm that it is cancelled.
        I do not need it any more.
        Please end it [in time|now].
        It must not renew.
        // Please cancel it in time.
        We do not need it any more, please end it.
        // Please confirm the end of it.
        I do not want to renew it.
        Can you cancel it today?
    """),
    "bug": _shares("""
        Please fix this [error|page].
        It worked before the update.
        A new version might help.
        The screen shows nothing else.
        // Please fix the error in the next update.
        Before the new version it did not crash.
        // Can you fix the error?
        It worked in the old version.
        The screen stays blank after that.
    """),
    "sales": _shares("""
        We want to buy [soon|in {month}].
        Please send your best offer.
        A discount would help us.
        We are comparing prices.
        // We would buy this month.
        Please send us your price.
        // Please make us a good offer.
        We hope for a discount.
        We want to compare the price before we buy.
    """),
    "privacy": _shares("""
        It is my personal data.
        I never gave my consent.
        Please confirm that the data is deleted.
        My privacy matters to me.
        // Please delete it from your records.
        The law protects my personal data.
        // I gave no consent to this.
        Please keep my personal data safe.
        It is about my privacy.
    """),
}
"""label -> a second sentence on the same matter"""

ASIDES = {
    "billing": _shares("""
        The {month} invoice was [correct|fine], thank you.
        [Billing|The bill] is [sorted|settled] since {day}.
        I have paid the {amount} bill already.
        No question about the {amount} charge.
        // The bill is fine and paid already. // No question about the {month} invoice, that is settled.
    """),
    "refund": _shares("""
        The refund for the {item} [arrived|came] last week, thank you.
        I do not [want|need] a refund.
        The other return went well and the money is back.
        This is not about [a|the] refund.
        // The refund came already, thank you. // My other refund arrived, this is not about it.
    """),
    "shipping": _shares("""
        The parcel itself came on {day}, no complaint there.
        Delivery was [quick|fine|on time], thank you.
        The package from {city} has arrived already.
        No complaint about the courier.
        // The delivery went well, no complaint there. // Your parcel came on time, thank you.
    """),
    "login": _shares("""
        I can log in again, so that is fine.
        My password works [now|again].
        The login [code|mail] came, thanks.
        This is not about my [password|login].
        // Signing in works again. // My new password works fine, no question about the login.
    """),
    "cancel": _shares("""
        I do not want to cancel, we like the service.
        We renewed the {plan} plan in {month} already.
        The old subscription has been cancelled already.
        No need to end [my membership|the contract].
        // We do not want to end the {plan} plan. // My membership goes on, no need to cancel it.
    """),
    "bug": _shares("""
        The crash from {month} is gone since the update.
        The {app} works [well|fine] otherwise.
        The error on {day} was my own mistake.
        No complaint about the {app}, it works.
        // No errors otherwise, the {app} works well. // The broken button works again.
    """),
    "sales": _shares("""
        We already have your quote and price list.
        {name} from sales was very helpful when we bought it.
        The demo in {month} was [good|fine], thank you.
        We do not need an offer.
        // Your offer in {month} was good, we bought it. // The discount is settled with {name} already.
    """),
    "privacy": _shares("""
        You may keep my data.
        I have read your privacy page already.
        My consent form is [on file|settled] since {month}.
        This is not about my personal data.
        // No question about my data. // You have my consent already, no need to delete my records.
    """),
}

GREETINGS = _shares("""
    Hi,
    Hello,
    Hi {name},
    Hello team,
    Hey,
    // Good day,
    Dear {name},
    // Good evening,
    Dear support,
""")

DETAILS = _shares("""
    I have been a customer since {year}.
    I am in {city} until {day}.
    {name} told me to write to you.
    This is the second time that I [ask|write].
    My customer number is {order}.
    It is [rather|quite] urgent.
    // I wrote about this on {day} too.
    My reference is {order}, from {city}.
    // Nobody picks up the phone in {city}.
    We talked to {name} of your office about it on {day}.
""")

CLOSINGS = _shares("""
    Thanks, {name}
    Thank you!
    Regards, {name}
    Please help.
    Best, {name}
    // Cheers, {name}
    Many thanks
    // Kind wishes from {name}
    I look forward to your reply.
""")

CLAUSES = {
    "governing law": _shares("""
        this Agreement [is|shall be] governed by [and construed under|and read under] the laws of {state}
        the laws of {state} apply to this Agreement, and {A} and {B} accept the jurisdiction of its courts
        any dispute [arising from|under] this Agreement shall be decided by the courts of {state}
        the validity and meaning of this Agreement are governed by the law of {state} without its conflict rules
        {A} and {B} submit to the [exclusive|non-exclusive] jurisdiction of the courts of {state}
        this contract is made under, and shall be construed according to, the law in force in {state}
        {state} law [governs|applies to] this contract and any claim that arises from it
        the parties choose the laws of {state} and the courts of [that place|{state}] for every dispute
        [this contract|this Agreement] is to be read and enforced under the law of {state}
        the courts of {state} have jurisdiction over any [claim|dispute] between {A} and {B}
        // questions about the meaning of this Agreement are to be settled under the law of {state}
        only the courts of {state} may hear a dispute between {A} and {B}, and they apply their own law
        // the law of {state}, and no other, decides how this Agreement is construed and enforced
        the parties choose the laws of {state} for every dispute between them, and its courts as the venue
        {A} agrees that the jurisdiction for any claim of {B} lies with the courts of {state}
        this Agreement takes effect as a contract under the laws of {state}, which govern it in all respects
        every claim must be brought before the courts of {state}, whose law [applies|governs]
    """),
    "termination": _shares("""
        either party may terminate this Agreement [on|upon] {days} written notice to the other
        {A} may [terminate|end] this Agreement at once if {B} [breaches|fails to perform] it and does not cure in {days}
        this Agreement [ends|expires] on the last day of {month} {year} unless {A} and {B} renew it
        if {B} becomes insolvent or bankrupt, {A} may terminate by notice with immediate effect
        {B} may terminate this Agreement for convenience after giving {A} {days} notice in writing
        upon [expiry|termination] of this Agreement {B} shall return all materials and stop using the services
        the term [runs|lasts] until {month} {year}, [unless ended earlier by notice|and may be renewed]
        {A} has the right to terminate for cause when {B} [does not pay|is in breach] for {days}
        each party can end this Agreement [early|at any time] by notice of {days}
        if a [material breach|breach] is not cured within {days}, the other party may terminate this Agreement
        // {A} can bring this Agreement to an end by written notice of {days}, with or without cause
        a material breach that {B} has not cured within {days} gives {A} the right to terminate
        // the term runs until {month} {year}, and each party may end it earlier upon notice of {days}
        should {B} stop doing business or become insolvent, this Agreement terminates at once
        {A} is free to terminate for cause when a breach by {B} remains uncured for {days}
        {B} may end this Agreement early, [without cause|for any cause], if it gives notice of {days}
        the right to terminate arises when {A} is insolvent or in breach for more than {days}
    """),
    "confidentiality": _shares("""
        {B} shall keep [all|any] Confidential Information of {A} secret and shall not disclose it to any third party
        neither party may disclose the terms of this Agreement [without consent|to the press or to the public]
        {B} may use the Confidential Information only under this Agreement and shall protect it with reasonable care
        Confidential Information does not include what is [publicly known|already known to {B}|made public by {A}]
        within {days} of a request {B} shall return or destroy all copies of the confidential documents of {A}
        {B} shall disclose trade secrets of {A} only to employees who need to know them and who are bound to secrecy
        [the documents|the customer lists] of {A} are confidential and must be held in secrecy by {B}
        {B} and its staff shall not [publish|reveal|copy] the [trade secrets|confidential data] of {A}
        what {A} [marks|labels] as confidential shall not be made known to [others|a third party]
        if the law orders {B} to disclose a secret of {A}, it shall give notice [first|before it does so]
        // everything that {A} marks as confidential must be held in secrecy by {B} and its staff
        {B} shall not reveal or publish any secret business information that it learns from {A}
        // the technical data and customer lists of {A} are confidential, and {B} shall not make them known to anyone
        if a court orders {B} to disclose Confidential Information, it shall first tell {A} within {days}
        {B} will guard the secrets of {A} as carefully as its own and will not copy or disclose them
        all Confidential Information must be returned to {A} or destroyed, and {B} shall keep no copy of it
        the staff of {B} are bound to secrecy about [the trade secrets|the documents] of {A}
    """),
    "payment": _shares("""
        {B} shall pay [each|every] invoice within {days} [of receipt|after its date]
        the fee is {sum} per year, payable in [four|twelve|two] equal instalments in advance
        [late|overdue] amounts bear interest at {percent} per year until they are paid in full
        {B} shall pay {A} a royalty of {percent} of net sales, due {days} after each quarter
        all prices are stated without tax, and {B} shall pay any sales tax that is shown on the invoice
        {A} shall invoice {B} each month for hours worked, and the invoice is due in {days}
        the price is [due|payable] in {days} after {A} sends its invoice
        {B} owes {A} a [monthly|yearly] fee of {sum}, to be paid by bank transfer
        interest of {percent} is due on any amount that is not paid [in time|within {days}]
        a deposit of {sum} is payable [in advance|on signing], the rest upon delivery
        // a deposit of {sum} is due on signing, and the rest of the price is payable within {days}
        invoices are payable by {B} by bank transfer, and interest of {percent} runs on sums not paid in time
        // {B} owes {A} a monthly fee of {sum}, to be paid in advance by bank transfer
        the purchase price of {sum} falls due when {A} sends its invoice, and must be paid in {days}
        {A} may charge interest of {percent} on every amount that is overdue by more than {days}
        each invoice must be paid by {B} in full within {days}, together with any sales tax
        the yearly fee of {sum} is payable in equal instalments, the first of them on signing
    """),
    "liability": _shares("""
        the [total|aggregate] liability of {A} under this Agreement shall not exceed {sum}
        neither party is liable for [indirect or consequential damages|lost profits or loss of data], however caused
        {A} is not [liable|responsible] for damage that {B} suffers through [delay|misuse|events beyond its control]
        nothing in this Agreement limits liability for fraud, death or personal injury caused by negligence
        {B} shall indemnify {A} against all losses, damages and claims that arise from its [negligence|breach]
        the damages that {B} can recover from {A} are limited to the greater of {sum} and {percent} of the price
        {A} is liable to {B} only for damages caused by its own [fraud|negligence]
        a limit of {sum} applies to all [claims|damages] for loss under this Agreement
        in no event shall {A} be liable for special damages or lost profits of {B}
        {B} holds {A} harmless from any [claim|loss|damage] caused by [its staff|misuse]
        // {A} shall in no event be liable to {B} for special or indirect damages or for lost profits
        a cap of {sum} applies to all damages that either party may claim from the other
        // under no theory of law does the liability of {A} for damages go beyond {sum}
        {B} holds {A} harmless from losses and claims of third parties caused by its own negligence
        loss of profit, loss of data and other consequential loss cannot be claimed from {A}
        the liability of each party for loss and damage is limited to {sum}, except in a case of fraud
        neither {A} nor {B} is responsible for damages caused by events beyond its control
    """),
    "assignment": _shares("""
        {B} may not assign [this Agreement|its rights|its duties] without the prior written consent of {A}
        {A} may assign this Agreement to [an affiliate|a buyer of its business] upon notice to {B}
        any attempt to [assign|transfer] this Agreement without consent is void
        this Agreement binds the successors and permitted assigns of {A} and {B}
        neither party shall [assign|sublicense] or transfer its rights, whether by merger or by sale, without consent
        a change of control of {B} counts as an assignment and needs the written consent of {A}
        the rights of {B} may not be transferred to [anyone|another person] unless {A} consents in writing
        {A} may transfer this Agreement to a [successor|new owner] upon a merger or sale of its business
        an assignment to [an affiliate|a successor] is allowed if {A} gives notice to {B}
        {B} shall not assign or sublicense its rights to any [third party|other person]
        // a transfer of this Agreement by {B} to any other person is void unless {A} consents in writing
        {A} is free to assign its rights to a successor that takes over all of its business
        // the rights of {B} are personal to it and may not be transferred or assigned to anyone
        upon a merger or sale of its business, {A} may transfer this Agreement to its successor
        no assignment by {B} is valid until {A} has given consent to the new party in writing
        without the consent of {A} a transfer of rights by {B} to an affiliate is void
        this Agreement may be assigned by {A} to a buyer, and binds the successors of {B}
    """),
    "insurance": _shares("""
        {B} shall maintain [general liability|property|professional] insurance of at least {sum} per occurrence
        {B} shall [name|list] {A} as an additional insured under each policy of insurance
        before work starts {B} shall give {A} a certificate of insurance from [a sound insurer|an insurer in {state}]
        each insurance policy shall provide that the insurer gives {A} {days} notice before the coverage changes
        during the term {B} shall carry workers compensation and automobile coverage with limits of {sum}
        {B} shall [insure|keep insured] the [goods|premises|equipment] against fire, theft and flood for {sum}
        the premium for the [fire|property] insurance is [paid|borne] by {B}, and {A} is an additional insured
        a policy with [coverage|a limit] of no less than {sum} must be kept in force by {B}
        {B} shall show {A} the certificates of its [liability|fire] insurance [each year|at any time]
        the [goods|premises] are to be insured by {B} with a sound insurer
        // {B} must take out a policy with coverage of no less than {sum} and show {A} the certificate
        the premium for the fire insurance of the premises is borne by {B}, and {A} is an additional insured
        // coverage under the policies that {B} carries must be no lower than {sum} for each occurrence
        {A} may ask at any time for certificates which show that {B} keeps the required insurance in force
        the goods shall be insured by {B} with a sound insurer against theft and fire until delivery
        insurance coverage of {sum} against fire and theft shall be kept in force by {B} during the term
        the certificate must show that the insurer of {B} names {A} as an additional insured
    """),
}

LEADS = {
    "governing law": _shares("""
        whatever law governs this Agreement,
        to the extent that the laws of {state} allow it,
        // where local law permits, // unless a court in {state} rules otherwise,
    """),
    "termination": _shares("""
        notwithstanding any termination of this Agreement,
        during the term and for {days} after termination,
        // until this Agreement ends, // even after the Agreement has expired,
    """),
    "confidentiality": _shares("""
        without prejudice to the confidentiality duties in Section {section},
        subject to Section {section} (Confidential Information),
        // apart from the secrecy duty in Section {section},
        // in line with the confidentiality rules of Section {section},
    """),
    "payment": _shares("""
        subject to the payment terms in Section {section},
        provided that all fees have been paid,
        // unless an invoice is overdue,
        // in return for the price stated in Section {section},
    """),
    "liability": _shares("""
        without limiting any liability under Section {section},
        except for damages covered by Section {section},
        // aside from the indemnity in Section {section},
        // with due regard to the liability cap of Section {section},
    """),
    "assignment": _shares("""
        subject to Section {section} (Assignment),
        whether or not this Agreement has been assigned,
        // for itself and its assigns,
        // as long as no transfer under Section {section} has taken place,
    """),
    "insurance": _shares("""
        in addition to the insurance required by Section {section},
        except to the extent covered by an insurance policy,
        // whether insured or not, // beyond the coverage described in Section {section},
    """),
}

TAILS = _shares("""
    Any change to this Section must be made in writing.
    This Section also applies to the affiliates of {B}.
    {A} and {B} have read this Section with counsel.
    The parties agreed on this point in {month} {year}.
    // This paragraph replaces the letter of {month} {year}.
    // Schedule {section} gives further detail.
    The headings are for reference only.
""")

PARTIES = _words("""the Supplier + the Buyer, the Licensor + the Licensee, the Company + the Consultant,
    the Landlord + the Tenant, Harbor Mills Ltd + Orrin Foods Inc, the Owner + the Contractor,
    Vale Software + the Customer, Kestrel Energy + Ridge Metals // the Publisher + the Author,
    Alder Labs + the Distributor, Maple Freight Ltd + Stone Brothers // the Franchisor + the Franchisee,
    the Bank + the Borrower, Topaz Media + Linden Press, the Agency + Wren Studios""")

TOPICS = _words("""parking permits, laptop loans, training grants, travel claims, meal vouchers, gym passes,
    locker keys, phone upgrades, visitor badges, taxi vouchers, study grants, desk chairs, hotel bookings, rail cards,
    tool loans, moving grants, guest passes, boat trips, music lessons, sports kits, car rentals, work boots,
    fuel cards // bicycle loans, uniform orders, library cards, conference tickets, bus passes // garage spaces,
    language courses, camera loans, child care grants, stage passes, lab coats, swimming lessons, van rentals""")

FACTS: dict[str, tuple[Pool, Pool, str]] = {
    "limit": (
        _shares("""
            The limit for {t} is {v}.
            {t} are limited to {v} per person.
            Staff may spend up to {v} on {t}.
            The budget for {t} is {v} a year.
            // For {t}, the limit is {v}. // Nobody may spend more than {v} on {t}.
            The yearly limit on {t} is {v}.
        """),
        _shares("""
            What is the limit for {t}?
            How much may staff spend on {t}?
            What is the budget for {t}?
            // What limit applies to {t}? // How much money may be spent on {t}?
            What is the yearly limit on {t}?
        """),
        "[{tens}0|{tens}0|{few},500] dollars",
    ),
    "deadline": (
        _shares("""
            The deadline for {t} is {v}.
            Requests for {t} must be sent within {v}.
            Staff must apply for {t} within {v}.
            Forms for {t} are due {v} after the start of work.
            // The time to apply for {t} is {v}. // For {t}, the deadline is {v}.
            All {t} must be applied for within {v}.
        """),
        _shares("""
            What is the deadline for {t}?
            Within how many days must requests for {t} be sent?
            How long do staff have to apply for {t}?
            // How much time is there to apply for {t}? // What deadline applies to {t}?
            Within what time must staff apply for {t}?
        """),
        "[{length} days|{length} days|{few} weeks]",
    ),
    "approver": (
        _shares("""
            {t} are approved by the {v}.
            The {v} approves {t}.
            Only the {v} may approve {t}.
            The approver for {t} is the {v}.
            // For {t}, the approver is the {v}. // The {v} has to approve all {t}.
            Approval of {t} lies with the {v}.
        """),
        _shares("""
            Who approves {t}?
            Who may approve {t}?
            Who is the approver for {t}?
            // Which person approves {t}? // Who has to approve {t}?
            With whom does the approval of {t} lie?
        """),
        "{unit} {rank}",
    ),
    "place": (
        _shares("""
            {t} are handed out in {v}.
            Staff collect {t} from {v}.
            The room for {t} is {v}.
            Questions about {t} are answered in {v}.
            // For {t}, the room is {v}. // Staff go to {v} to collect {t}.
            {t} are kept in {v}.
        """),
        _shares("""
            Where are {t} handed out?
            Where do staff collect {t}?
            What is the room for {t}?
            // In which room are {t} handed out? // Where are {t} collected?
            Where should staff go for {t}?
        """),
        "room {letter}{length}",
    ),
    "form": (
        _shares("""
            Use form {v} for {t}.
            The form for {t} is {v}.
            Requests for {t} are made on form {v}.
            {t} need a signed form {v}.
            // For {t}, the form is {v}. // Staff fill in form {v} to get {t}.
            Form {v} covers {t}.
        """),
        _shares("""
            Which form is used for {t}?
            What is the form for {t}?
            Which form do {t} need?
            // On which form are {t} requested? // Which form covers {t}?
            What form must be filled in for {t}?
        """),
        "{letter}{letter}{length}",
    ),
    "validity": (
        _shares("""
            {t} are valid for {v}.
            {t} run for {v}.
            The term of {t} is {v}.
            {t} must be renewed after {v}.
            // For {t}, the term is {v}. // All {t} stay valid for {v}.
            {t} end after a term of {v}.
        """),
        _shares("""
            How long are {t} valid?
            What is the term of {t}?
            After what time must {t} be renewed?
            // How long is the term of {t}? // For how long are {t} valid?
            When do {t} have to be renewed?
        """),
        "[{length} months|{term} years]",
    ),
    "contact": (
        _shares("""
            Ask {v} about {t}.
            The contact for {t} is {v}.
            {v} looks after {t}.
            Staff should call {v} about {t}.
            // For {t}, the contact is {v}. // To ask about {t}, call {v}.
            {v} is the contact for all {t}.
        """),
        _shares("""
            Whom should staff ask about {t}?
            Who is the contact for {t}?
            Who looks after {t}?
            // Who is the contact person for {t}? // Whom can staff call to ask about {t}?
            Which person looks after {t}?
        """),
        "{name} {surname}",
    ),
}  # fmt: skip
"""kind of fact -> statements, questions, frame of the value; gaps {t} topic and {v} value"""

REMARKS = _shares("""
    This rule is from {year}.
    Managers keep a list of all requests.
    The handbook is read again every {month}.
    // This page was last changed in {month} {year}. // New staff get a copy of this page.
    The board agreed to this in {month} {year}.
""")

SIZES = _numbers(28, 64)

COLOURS = _words("""red, blue, green, black, white, yellow, grey, pink, navy, gold, beige, scarlet, maroon, rose, teal,
    ivory, bronze, violet, lilac, khaki, crimson, mint, plum, coral, sand, olive, ruby, steel // brown, cream, amber
    // orange, purple, silver, copper""")

GARMENTS = _words("""jacket, shirt, coat, sweater, vest, gown, hat, raincoat, apron, hoodie, cardigan, shawl, robe, cap
    // jumper, blouse, tunic // cloak, skirt, suit, waistcoat""")

THINGS = {
    "size": _shares("""
        a {garment}, size {size}
        a {garment} in size {size}
        a size {size} {garment}
        two {garment}s of size {size}
        the {garment} from your page in size {size}
        // one {garment}, in size {size} // the {garment} in size {size}
        one more {garment}, size {size}
        just one {garment} of size {size}
    """),
    "size colour": _shares("""
        a {garment}, size {size}, colour {colour}
        a {garment}, colour {colour}, size {size}
        a {garment} in the colour {colour}, size {size}
        a {colour} {garment} in size {size}
        two {garment}s of size {size} in the colour {colour}
        // one {garment} in size {size}, colour {colour} // the {garment} in size {size} and colour {colour}
        just one {garment} of size {size}, colour {colour}
        one more {garment} in the colour {colour} and size {size}
    """),
}

WISHES = _shares("""
    please send me {thing}
    I [would like|want] to order {thing}
    can I [get|have] {thing}
    we need {thing} for {name}
    I will take {thing}
    {name} wants {thing}
    my order is {thing}
    [I need|we want] {thing}
    please put {thing} on my order
    // could you put aside {thing}
    {name} asked for {thing}
    // do reserve {thing} for us
    kindly get me {thing}
    we have decided on {thing}
    I am ordering {thing}
    this is an order for {thing}
""")

PLACES = _shares("""
    , to be sent to {city}
    and ship it to {city}
    , delivery to {city}
    for our shop in {city}
    , send it to {city}
    and bring it to {city}
    // , please deliver it to {city}
    for delivery to {city}
    // and it should go to {city}
    , delivered to {city}
    , shipped to {city}
    and send it on to {city}
""")

DECOYS = {
    "size": _shares("""
        Size {size} did not fit me.
        {name} could not wear size {size}.
        // My old one was size {size}. // I did not look good in size {size}.
    """),
    "colour": _shares("""
        The {colour} one has faded.
        Everybody here has the {colour} one already.
        // I was not happy with the {colour} one. // My friends have the {colour} one already.
    """),
    "city": _shares("""
        My sister in {city} has the same.
        I saw it in {city} last {month}.
        // We know you from your stall in {city}. // A friend from {city} told me about you.
    """),
}

CHATTER = _shares("""
    Are you open on {day}?
    How do I wash the {garment}?
    Thank you for the {garment}, {name} likes it.
    When do you have new {garment}s?
    Can I pay by card on {day}?
    Is {name} in the office on {day}?
    Your page does not load since {day}.
    How long does a {garment} last?
    // Do you repair a {garment}?
    Who made this {garment}?
    Is there a sale in {month}?
    // Which {garment} does {name} wear in the picture?
    Do you also sell gift cards?
    May I bring the {garment} back on {day}?
    Has {name} replied to my last message?
""")
