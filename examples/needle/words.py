# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The English words that the needle model reads and writes as one token each."""

_NOUNS = """
acorn actor airport album alley anchor angel ankle answer ant apple apron arch arm army arrow
artist atlas attic aunt autumn badge baker balcony ball banana bank barn barrel basin basket
battle beach beaver beetle bell belt bench berry bike bird blanket blossom board boat bone
bonnet book boot bottle bowl branch bread breeze brick bridge broom brother bucket bus bush
butcher butter button cabin cable cactus cake camel camera camp canal candle canoe canyon cap
car card carpet carrot castle cat cave cellar chain chair chalk cheese cherry chess chicken
chimney church circle city clay cliff clock cloud clown coast coat cobra coffee coin comet
compass cookie copper coral corn cottage cotton couch court cousin cow crab cradle crane crayon
creek cricket crown cup curtain cushion daisy dance dawn deer desert desk diamond diary dinner
doctor dog doll dolphin donkey door dragon drawer dream dress drum duck dust eagle ear earth
echo egg elbow elephant engine fabric factory falcon family farm farmer feather fence fern
ferry field finger fire fish flag flame flower flute fog forest fork fountain fox frog fruit
garden garlic gate ghost giant ginger giraffe glass globe glove goat gold goose grape grass
guitar hammer hand harbor hat hawk hay heart hedge helmet hen hill honey hook horn horse hotel
house ice ink iron island ivory jacket jar jewel judge juice jungle kettle key king kitchen
kite knee knife ladder lake lamp lantern lawn leaf lemon letter library lion lizard lock log
lunch magnet mango map marble market mask meadow medal melon metal milk mill mirror monkey moon
moth motor mountain mouse mouth museum music nail napkin neck needle nest net night north nose
notebook nurse nut oak ocean office olive onion orange orchard oven owl ox paint palace panda
paper parade parrot path peach pear pearl pebble pencil pepper piano picture pig pigeon pillow
pilot pine pipe planet plate plum pocket poem pond pony potato prince pumpkin puppet puzzle
queen quilt rabbit radio rain raven ribbon rice ring river road robin rock rocket roof room
root rope rose ruby sail salt sand scarf school scissors sea seed shadow shark sheep shell
shield ship shirt shoe shop silver singer sister sky snail snake snow soap sock soldier song
soup spear spider spoon spring square squirrel stable stair star station statue stone storm
stove street sugar summer sun swan sword table tail teacher temple tent thread throne thunder
tiger tooth torch tower town toy train tree truck trumpet tulip tunnel turtle umbrella uncle
valley vase velvet village violin wagon wall walnut water wave well whale wheat wheel whistle
wind window wing winter wire wolf wood wool worm yard zebra
"""

_ADJECTIVES = """
ancient angry bitter black blue brave bright broken brown busy calm cheap clean clever cold
cool crazy cruel curious damp dark dear deep dirty dry dull early empty famous fancy fast fat
fierce final flat fresh full funny gentle giddy glad golden grand gray great green grumpy happy
hard heavy hidden high hollow honest hot huge humble hungry icy jolly kind large late lazy
light little lively lonely long loud lucky mad mighty narrow neat new nice noisy odd old pale
perfect plain polite poor pretty proud purple quick quiet rare red rich ripe rough round royal
rusty sad salty shady sharp shiny short shy silent silly simple sleepy slim slow small smart
smooth soft sour stale steep sticky strange strong sunny sweet swift tall tame thick thin tidy
tiny tired tough ugly vast warm weak wet white wide wild wise wooden yellow young
"""

# Of sentences that say nothing, and of questions.
_OTHERS = """
the a an of and or in on at to for from with by as is are was were be been it its this that
these those he she they we you his her their our your my me him them us who which what when
where why how all any each every some no not only very too so than then there here now again
back up down over under near far before after between into out off about around go goes went
come came say says said see saw look looked find found give gave take took make made get got
know knew think thought tell told ask asked work worked walk walked run ran sit sat stand stood
live lived love loved hold held keep kept bring brought begin began turn turned open opened
close closed play played move moved like liked call called need needed feel felt leave left put
let mean show hear heard one two three four five six seven eight nine ten first second third
last next other another same more most many much few less long once twice often always never
sometimes still yet also even just if because while until but can could will would shall should
may might must do does did have has had day year time man woman child people place thing way
life world part side end name word number numbers special common variable variables equal
equals text question answer user assistant system magic mentioned
provided following value values key keys
"""

NOUNS, ADJECTIVES, OTHERS = (tuple(text.split()) for text in (_NOUNS, _ADJECTIVES, _OTHERS))
