<?php

require_once __DIR__ . '/../src/helpers.php';

use App\Blog\{Post, Store};

$store = new Store();
$store->add(new Post(title('first words')));
echo count($store);
